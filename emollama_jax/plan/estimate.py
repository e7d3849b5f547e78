"""From a compiler's figures to seconds: a roofline under assumed clocks and bandwidths, never a measurement.

A program takes at least as long as its arithmetic at the chip's peak, and its arguments once through memory, take. The
compiler's cycles, where it counts them, say more, but leave out its hand-written kernels (splash attention), whose
operations are added at the chip's peak. Collectives that run beside computation cost what they take longer than it;
the others are added.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from emollama_jax.config import Config
from emollama_jax.data.batch import soft_tokens_per_clip
from emollama_jax.data.datasets import expected_images
from emollama_jax.models.llama import Llama, LlamaConfig
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.models.vit import EncoderConfig
from emollama_jax.plan.programs import PROMPT_TEXT, SECONDS
from emollama_jax.plan.topology import Chip, Topology
from emollama_jax.sharding import abstract
from emollama_jax.train.speed import Cost, cost_of, encoder_flops, encoder_tokens, splash_flops
from emollama_jax.weights.encoders import ENCODERS

BY_KERNEL = ("auto", "splash")  # attention by a hand-written kernel, where the compiler counts cycles
RECOMPUTED = {"none": 0.0, "dots": 0.0, "full": 1.0}  # of the forward pass, in the backward pass


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of one run of a program, and its parts.

    Attributes:
        arithmetic: all operations, recomputed ones too, at the peak.
        memory: the arguments read once.
        compute: by the compiler's cycles; the larger of the two above if it counts none.
        hidden: collectives that overlap with computation.
        exposed: collectives that computation waits for.
        mfu: model FLOPs utilisation, without recomputation; None for programs other than the step.
        rate: `unit`s a second, on all devices.
    """

    arithmetic: float
    memory: float
    compute: float
    hidden: float
    exposed: float
    mfu: float | None
    rate: float
    unit: str

    @property
    def seconds(self) -> float:
        return max(self.compute, self.hidden, self.arithmetic, self.memory) + self.exposed


def estimate(name: str, config: Config, topology: Topology, rows: int, figures: Mapping[str, Any]) -> Estimate:
    """The seconds of a compiled program."""
    chip, share = topology.chip, 1 / topology.size
    run, useful, kernels = _operations(name, config, rows)
    arithmetic, memory = run * share / chip.flops, figures["arguments"] / chip.bandwidth
    counted = figures["cycles"] / chip.clock if chip.clock else 0.0
    if counted:
        counted += kernels * share / chip.flops
    compute = counted or max(arithmetic, memory)
    hidden, exposed = (_wire(chip, figures, hidden=hidden) for hidden in (True, False))
    amount, unit = _amount(name, config, rows)
    result = Estimate(arithmetic, memory, compute, hidden, exposed, None, 0.0, unit)
    mfu = useful * share / chip.flops / result.seconds if name == "step" else None
    return dataclasses.replace(result, mfu=mfu, rate=amount / result.seconds)


def _wire(chip: Chip, figures: Mapping[str, Any], *, hidden: bool) -> float:
    seconds = (
        one["bytes"] * one["times"] / (chip.network if one["crosses"] else chip.link)
        for one in figures["collectives"]
        if one["hidden"] == hidden
    )
    return float(sum(seconds))


def _amount(name: str, config: Config, rows: int) -> tuple[float, str]:
    """The amount of work in one run of a program on `rows`, and its unit."""
    if name == "step":
        return float(rows * config.data.sequence_length), "tokens"
    units = {"prefill": "prompts", "decode": "tokens", "mae": "faces", "eva_vit": "frames"}
    return float(rows), units.get(name, "clips")


def _operations(name: str, config: Config, rows: int) -> tuple[float, float, float]:
    """Floating-point operations on all devices: (executed, required by the mathematics of training, executed by the
    attention kernel)."""
    if name in ENCODERS:
        return rows * _encoder(name, getattr(config, name)), 0.0, rows * _encoder_kernels(getattr(config, name))
    if name != "step":
        cost = _cost(config.llama, LoRAConfig(rank=0))
        length = soft_tokens_per_clip(config) + PROMPT_TEXT
        tokens = rows * (length if name == "prefill" else 1)
        return tokens * (2 * cost.frozen + cost.attention / 3 * length), 0.0, 0.0
    cost, tokens = _cost(config.llama, config.lora), float(rows * config.data.sequence_length)
    # Kernels skip what lies after a token, not what lies in another segment.
    attention = tokens * cost.attention * config.data.sequence_length
    segments = config.data.sequence_length / config.data.clips_per_row
    again = RECOMPUTED[config.llama.remat]
    forward = 2 * tokens * (cost.frozen + cost.adapters)
    frames = rows * config.data.clips_per_row if expected_images(config.data.train) == "frames" else 0
    encoded = frames * _encoder("eva_vit", config.eva_vit) if frames else 0.0
    attention *= 1 + again / 3
    kernels = attention if config.llama.attention in BY_KERNEL else 0.0
    kernels += frames * _encoder_kernels(config.eva_vit)
    matrices = tokens * (4 * cost.frozen + 6 * cost.adapters) + again * forward
    return matrices + attention + encoded, cost.flops(tokens, segments) + encoded, kernels


@functools.lru_cache
def _cost(llama: LlamaConfig, lora: LoRAConfig) -> Cost:
    return cost_of(nnx.merge(*abstract(lambda: Llama(llama, lora, rngs=nnx.Rngs(0)))))


def _encoder_kernels(settings: EncoderConfig) -> float:
    """Operations of an encoder's attention kernel on one image, clip or sound."""
    return float(splash_flops(settings, encoder_tokens(settings, SECONDS))) if settings.attention in BY_KERNEL else 0.0


@functools.lru_cache
def _encoder(name: str, settings: EncoderConfig) -> float:
    """Operations of an encoder's forward pass on one image, clip or sound."""
    return float(encoder_flops(nnx.merge(*abstract(lambda: ENCODERS[name](settings, rngs=nnx.Rngs(0)))), SECONDS))
