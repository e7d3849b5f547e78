"""HuBERT (arXiv:2106.07447), large and base: the encoder of the voice.

Axes: B batch, S samples (16 kHz), T frames (one every 320 samples), C channels of the convolutions, K taps, D width.

Rows may be padded: only the first `lengths[b]` samples of row b have an effect.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from emollama_jax.fields import field
from emollama_jax.models.layers import LayerNorm, Linear, normal, param
from emollama_jax.models.vit import Block, EncoderConfig, gelu, run_blocks

CONV_NORMS = ("layer", "group")
CONV_NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class HubertConfig(EncoderConfig):
    """The defaults are HuBERT-large's."""

    layer_norm_eps: float = field(1e-5, gt=0)
    conv_dims: tuple[int, ...] = field((512,) * 7, gt=0)
    """Channels C of each convolution."""
    conv_kernels: tuple[int, ...] = field((10, 3, 3, 3, 3, 2, 2), gt=0)
    """Taps K of each convolution."""
    conv_strides: tuple[int, ...] = field((5, 2, 2, 2, 2, 2, 2), gt=0)
    """Stride of each convolution."""
    conv_norm: str = field("layer", choices=CONV_NORMS)
    """Norm of the convolutions: layer (over the channels, after each) or group (over time, after the first)."""
    conv_bias: bool = True
    """Whether the convolutions have biases."""
    feature_norm: bool = True
    """Whether the convolutions' output is normalised before its projection."""
    norm_first: bool = True
    """Pre-norm blocks and a norm after the last (large) if true, post-norm blocks (base) if false."""
    position_kernel: int = field(128, gt=0)
    """Taps of the convolution that adds positions."""
    position_groups: int = field(16, gt=0)
    """Channel groups of that convolution."""
    layer: int = -1
    """Block after which hidden states are taken as features, 0 before the first; -1 after the last one and its norm."""

    def __post_init__(self):
        EncoderConfig.__post_init__(self)
        if not len(self.conv_dims) == len(self.conv_kernels) == len(self.conv_strides) > 0:
            raise ValueError("conv_dims, conv_kernels and conv_strides must hold one number for each convolution")
        if not -self.num_layers - 1 <= self.layer <= self.num_layers:
            raise ValueError(f"layer={self.layer}: give 0 to num_layers={self.num_layers}, or -1 and down")
        if self.hidden_size % self.position_groups:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of position_groups={self.position_groups}"
            )

    def num_frames(self, samples: Any) -> Any:
        """Frames of so many samples (an int or an integer array); 0 or less if they are too few for one."""
        for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples

    @property
    def min_samples(self) -> int:
        """Samples of one frame."""
        samples = 1
        for kernel, stride in zip(reversed(self.conv_kernels), reversed(self.conv_strides), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples


class Conv(nnx.Module):
    """A convolution over time, kernel [K, C in / groups, C out]."""

    def __init__(
        self,
        sizes: tuple[int, int, int],
        *,
        stride: int = 1,
        groups: int = 1,
        padding: Sequence[tuple[int, int]] = ((0, 0),),
        dtype: str,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        taps, inputs, outputs = sizes
        self.stride, self.groups, self.padding = (stride,), groups, tuple(padding)
        kernel = normal(rngs.params(), (taps, inputs // groups, outputs), (2 / (taps * inputs)) ** 0.5)
        self.kernel = param(kernel.astype(dtype), (None, None, "embed"))
        self.bias = param(jnp.zeros(outputs, dtype), ("embed",)) if use_bias else None

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B t c"]:
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            self.stride,
            self.padding,
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=self.groups,
        )
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class TimeNorm(nnx.Module):
    """Normalises each channel over the valid frames to zero mean and unit variance, in float32 (a group norm with one
    channel a group)."""

    def __init__(self, features: int, *, dtype: str):
        self.scale = param(jnp.ones(features, dtype), (None,))
        self.bias = param(jnp.zeros(features, dtype), (None,))

    def __call__(self, x: Float[Array, "B T C"], counts: Bool[Array, "B T 1"]) -> Float[Array, "B T C"]:
        y = x.astype(jnp.float32)
        mean = jnp.mean(y, 1, keepdims=True, where=counts)
        y = y - mean
        variance = jnp.mean(jnp.square(y), 1, keepdims=True, where=counts)
        y = y * jax.lax.rsqrt(variance + CONV_NORM_EPS)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class ConvLayer(nnx.Module):
    """Convolution, norm (where it has one), GELU."""

    def __init__(self, config: HubertConfig, index: int, *, rngs: nnx.Rngs):
        features = config.conv_dims[index]
        self.conv = Conv(
            (config.conv_kernels[index], config.conv_dims[index - 1] if index else 1, features),
            stride=config.conv_strides[index],
            dtype=config.param_dtype,
            use_bias=config.conv_bias,
            rngs=rngs,
        )
        if config.conv_norm == "layer":
            self.norm = LayerNorm(features, epsilon=CONV_NORM_EPS, dtype=config.param_dtype)
        elif index == 0:
            self.norm = TimeNorm(features, dtype=config.param_dtype)

    def __call__(self, x: Float[Array, "B T C"], lengths: Int[Array, " B"]) -> Float[Array, "B t c"]:
        """`lengths`: the valid frames of this layer's output."""
        x = self.conv(x)
        match getattr(self, "norm", None):
            case TimeNorm() as norm:
                x = norm(x, _counts(x, lengths))
            case LayerNorm() as norm:
                x = norm(x)
        return gelu(x)


def _counts(x: Float[Array, "B T C"], lengths: Int[Array, " B"]) -> Bool[Array, "B T 1"]:
    return (jnp.arange(x.shape[1]) < lengths[:, None])[..., None]


class Hubert(nnx.Module):
    """Convolutions over the samples, a convolution that adds positions, and the transformer."""

    def __init__(self, config: HubertConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.convs = nnx.List([ConvLayer(config, i, rngs=rngs) for i in range(len(config.conv_dims))])
        channels, width, dtype = config.conv_dims[-1], config.hidden_size, config.param_dtype
        norm = lambda features: LayerNorm(features, epsilon=config.layer_norm_eps, dtype=dtype)
        self.feature_norm = norm(channels) if config.feature_norm else None
        self.proj = Linear(channels, width, axes=(None, "embed"), kernel_dtype=dtype, bias_dtype=dtype, rngs=rngs)
        taps = config.position_kernel
        self.positions = Conv(
            (taps, width, width),
            groups=config.position_groups,
            padding=((taps // 2, (taps - 1) // 2),),
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = norm(width)
        self.layers = Block(config, key_bias=True, norm_first=config.norm_first, rngs=rngs)

    def __call__(self, waveforms: Float[Array, "B S"], lengths: Int[Array, " B"]) -> Float[Array, "B T D"]:
        """Hidden states after `config.layer`, float32. Of row b the first `num_frames(lengths[b])` are valid.

        Args:
            waveforms: 16 kHz mono, each of zero mean and unit variance.
            lengths: samples of each row, at least `config.min_samples`.
        """
        cfg = self.config
        x = waveforms[..., None].astype(cfg.compute_dtype)
        for conv, kernel, stride in zip(self.convs, cfg.conv_kernels, cfg.conv_strides, strict=True):
            lengths = (lengths - kernel) // stride + 1
            x = conv(x, lengths)
        x = self.proj(x if self.feature_norm is None else self.feature_norm(x))
        x = jnp.where(_counts(x, lengths), x, 0)  # the position convolution looks beyond the end
        x = x + gelu(self.positions(x))
        if not cfg.norm_first:
            x = self.norm(x)
        count = cfg.layer % (cfg.num_layers + 1)
        x = run_blocks(self.layers, x, lengths, count=count).astype("float32")
        return self.norm(x) if cfg.norm_first and count == cfg.num_layers else x

    def encode(self, waveforms: Float[Array, "B S"], lengths: Int[Array, " B"]) -> Float[Array, "B D"]:
        """One vector for each clip: the mean of its frames' hidden states."""
        hidden = self(waveforms, lengths)
        return jnp.mean(hidden, axis=1, where=_counts(hidden, self.config.num_frames(lengths)))
