"""What a training step and an encoder cost in operations, and what devices can do: the utilisation follows."""

import math
from typing import NamedTuple

from flax import nnx

from emollama_jax.media.audio import SAMPLE_RATE
from emollama_jax.models.attention import splash_padding
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.models.hubert import Hubert, HubertConfig
from emollama_jax.models.llama import Llama
from emollama_jax.models.mae import Mae
from emollama_jax.models.videomae import VideoMae, VideoMaeConfig
from emollama_jax.models.vit import EncoderConfig
from emollama_jax.weights.engine import param_values


class Peak(NamedTuple):
    """A device's dense half-precision speed and its memory bandwidth, as its maker states them."""

    flops: float
    bytes_per_s: float


# The first entry counts that a device's kind begins with. Sources: NVIDIA's data sheets (dense tensor-core figures in
# bfloat16, in float16 for T4) and Google's pages on the architecture of each TPU (bfloat16).
PEAKS = {
    "NVIDIA H200": Peak(989e12, 4800e9),
    "NVIDIA H100 PCIe": Peak(756e12, 2000e9),
    "NVIDIA H100": Peak(989e12, 3350e9),
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 1555e9),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 2039e9),
    "NVIDIA A100-PCIE-40GB": Peak(312e12, 1555e9),
    "NVIDIA A100 80GB PCIe": Peak(312e12, 1935e9),
    "NVIDIA L4": Peak(121e12, 300e9),
    "Tesla T4": Peak(65e12, 320e9),
    "TPU v6 lite": Peak(918e12, 1640e9),
    "TPU v6e": Peak(918e12, 1640e9),
    "TPU v5 lite": Peak(197e12, 819e9),
    "TPU v5e": Peak(197e12, 819e9),
    "TPU v5": Peak(459e12, 2765e9),  # v5p; v5e calls itself lite
    "TPU v4": Peak(275e12, 1228e9),
}


def device_peak_flops(kind: str) -> Peak | None:
    """The peaks of a device by its `device_kind`; None where they are not known."""
    return next((peak for name, peak in PEAKS.items() if f"{kind} ".startswith(f"{name} ")), None)


class Cost(NamedTuple):
    """The weights of a language model that every token is multiplied with, and its attention's width."""

    frozen: int
    adapters: int
    attention: int
    """Floating-point operations of a token for each position of its sequence, forward and twice that backward."""

    def flops(self, tokens: int | float, length: int | float) -> float:
        """What the mathematics of a step asks for, on `tokens` in sequences of `length`: for each token 4 operations a
        frozen weight, whose own gradient is not needed, 6 a weight of an adapter, and attention over half the sequence
        on average. Recomputation does not count."""
        return float(tokens * (4 * self.frozen + 6 * self.adapters + self.attention * length))

    def flops_4n(self, tokens: int | float) -> float:
        """The rule of thumb for adapters: 4 operations a weight and token, without attention."""
        return float(4 * tokens * (self.frozen + self.adapters))


def cost_of(model: Llama) -> Cost:
    """The cost of training a model's adapters."""
    config = model.config
    frozen = adapters = 0
    for path, value in param_values(nnx.state(model)).items():
        if ".lora_" in path:
            adapters += math.prod(value.shape)
        elif path.endswith(".kernel") or (config.tie_embeddings and path == "embed.embedding"):
            frozen += math.prod(value.shape)
    return Cost(frozen, adapters, 6 * config.num_layers * config.num_heads * config.head_dim)


def encoder_tokens(config: EncoderConfig, seconds: int) -> int:
    """Tokens of an encoder's blocks for one clip.

    Args:
        seconds: of sound, for HuBERT.
    """
    if isinstance(config, HubertConfig):
        return config.num_frames(seconds * SAMPLE_RATE)
    if isinstance(config, VideoMaeConfig):
        return config.num_frames // config.tubelet_size * config.grid**2
    return config.grid**2 + 1


def encoder_flops(model: EvaVit | Mae | VideoMae | Hubert, seconds: int) -> int:
    """Floating-point operations of an encoder on one clip: twice the multiplications of matrix products and
    convolutions. The model may be abstract.

    Args:
        seconds: of sound, for HuBERT.
    """
    cfg, size = model.config, lambda parameter: math.prod(parameter.get_value().shape)
    tokens = encoder_tokens(cfg, seconds)
    if isinstance(model, Hubert):
        samples, stem = seconds * SAMPLE_RATE, 0
        for layer, taps, stride in zip(model.convs, cfg.conv_kernels, cfg.conv_strides, strict=True):
            samples = (samples - taps) // stride + 1
            stem += samples * size(layer.conv.kernel)
        stem += tokens * (size(model.proj.kernel) + size(model.positions.kernel))
    else:
        patches = model.patches if isinstance(model, VideoMae) else model.embed.patches
        stem = tokens * size(patches.proj.kernel)
    kernels = cfg.num_layers * (4 * cfg.hidden_size**2 + 2 * cfg.hidden_size * cfg.intermediate_size)
    attention = cfg.num_layers * 2 * tokens * cfg.hidden_size
    return 2 * (stem + tokens * (kernels + attention))


def splash_flops(config: EncoderConfig, tokens: int) -> int:
    """Floating-point operations of an encoder's splash attention on one clip: of whole blocks of tokens, and of heads
    that fill the lanes of the matrix unit."""
    rows, lanes = tokens + splash_padding(tokens), 128
    head = -(-config.hidden_size // config.num_heads // lanes) * lanes
    return 4 * config.num_layers * config.num_heads * head * rows**2
