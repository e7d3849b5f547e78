"""Shared by the benchmarks of training: our steps and the peer's on the same batches, and a check that they agree."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from emollama_jax.bench.peer import PEER, kernel_note
from emollama_jax.bench.report import OURS, Figures, Measure, Result, peak_memory
from emollama_jax.bench.train_peer import TorchTraining
from emollama_jax.config import Config
from emollama_jax.data.batch import Batch
from emollama_jax.train.optimizer import make_optimizer
from emollama_jax.train.setup import placed_state
from emollama_jax.train.step import make_step
from emollama_jax.weights.engine import first_device

# How far the first steps of both may be apart in float32: in the loss, and in the norm of the gradient relative to it.
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-3, 1e-4
ROUGH_TOLERANCE = 5e-2  # of both in half precision, and of the norm with dropout, which the two do not draw alike


class Step(NamedTuple):
    """Loss and gradient norm of a step."""

    loss: float
    grad_norm: float


def our_steps(model: nnx.Module, config: Config, loss: Callable, batches: Sequence[Batch], figures: Figures) -> Measure:
    """One step on each batch. It takes over the memory of what is trained.

    Args:
        loss: of `train.step`, for this model.
        figures: of all the batches together.
    """
    mesh, optimizer = first_device(), make_optimizer(config.train)
    graphdef, frozen, state = placed_state(model, optimizer, config, mesh)
    on_device, rng = jax.device_put((list(batches), jax.random.key(config.seed)), NamedSharding(mesh, PartitionSpec()))
    step = make_step(graphdef, optimizer, loss, mesh=mesh)
    steps, compiled = [], None

    def measure() -> tuple[Figures, list[Step]]:
        nonlocal state, compiled
        compiled = compiled or step.lower(state, frozen, on_device[0], rng).compile()
        found, start = [], time.perf_counter()
        for batch in on_device:
            state, metrics = compiled(state, frozen, batch, rng)
            found.append(metrics)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - start
        steps.extend(Step(float(metrics["loss"]), float(metrics["grad_norm"])) for metrics in found)
        memory = {name: value for name, value in peak_memory().items() if name == "device_gib"}
        return {**figures, "seconds": seconds, **memory}, steps

    return measure


def peer_steps(peer: TorchTraining, batches: Sequence[Mapping[str, np.ndarray]], figures: Figures) -> Measure:
    """The peer's step on each of its batches."""
    import torch

    steps, on_cuda = [], peer.device.type == "cuda"
    on_device = [{name: torch.tensor(x, device=peer.device) for name, x in batch.items()} for batch in batches]

    def measure() -> tuple[Figures, list[Step]]:
        found = [peer.step(batch) for batch in on_device]
        steps.extend(Step(float(loss), float(norm)) for loss, norm in found)  # waits for the device
        memory = {"device_gib": torch.cuda.max_memory_allocated() / 2**30} if on_cuda else {}
        return figures | memory, steps

    return measure


def ms_per_step(run: Figures) -> Figures:
    return {"ms_per_step": 1e3 * run["seconds"] / run["steps"]}


def check_first_steps(results: Sequence[Result], config: Config, *, compare_norms: bool = True) -> list[str]:
    """Notes on how both train. Raises RuntimeError where their first steps differ.

    Args:
        compare_norms: compare the gradients' norms too; with dropout, those of few tokens differ.
    """
    first = {result.who: result.output[0] for result in results}
    told = ", ".join(f"{who} {step.loss:.5f} and {step.grad_norm:.5f}" for who, step in first.items())
    ours, theirs, half = first[OURS], first[PEER], config.llama.compute_dtype != "float32"
    loss_tolerance = ROUGH_TOLERANCE if half else LOSS_TOLERANCE
    norm_tolerance = ROUGH_TOLERANCE if half or config.lora.dropout else NORM_TOLERANCE
    same_loss = abs(ours.loss - theirs.loss) <= loss_tolerance
    same_norm = abs(ours.grad_norm - theirs.grad_norm) <= norm_tolerance * theirs.grad_norm
    if not (same_loss and (same_norm or not compare_norms)):
        raise RuntimeError(f"not the same training: loss and gradient's norm of the first step are {told}")
    recomputes = "every block" if config.llama.remat != "none" else "nothing"
    return [
        f"{OURS} recomputes with remat={config.llama.remat}, {PEER} {recomputes}",
        *kernel_note(config.llama),
        f"loss and gradient's norm of the first step: {told}",
    ]
