"""The transformer encoder of EVA-ViT, MAE, VideoMAE and HuBERT, and the embeddings of the vision ones
(arXiv:2010.11929).

Axes: B batch, T tokens, D width, N heads, H head size, F MLP width, L layers (leading: their parameters are stacked),
I x J image, t frames, P patches.
"""

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from emollama_jax.fields import AFFECTS, check_fields, field
from emollama_jax.models.attention import KERNELS, bidirectional_attention, resolve_for_devices, splash_padding
from emollama_jax.models.layers import FLOAT_DTYPES, QUANTISED, LayerNorm, Linear, computed_once, normal, param
from emollama_jax.sharding import constrain

GELU_LOGIT = (8.671245e-06, -0.000969689, 0.07559512, 1.593468)  # P of `gelu_by_logistic`, from the highest power
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """Architecture and execution of a stack of encoder blocks; the defaults are ViT-L's."""

    hidden_size: int = field(1024, gt=0)
    """Width D of the residual stream."""
    intermediate_size: int = field(4096, gt=0)
    """Width F of the MLP."""
    num_layers: int = field(24, gt=0)
    """Encoder blocks L."""
    num_heads: int = field(16, gt=0)
    """Attention heads N."""
    layer_norm_eps: float = field(1e-6, gt=0)
    """Epsilon of the layer norms."""
    kernel_dtype: str = field("bfloat16", choices=FLOAT_DTYPES + QUANTISED, affects=AFFECTS)
    """Storage of the blocks' kernels: float32, bfloat16, float16, int8 or nf4."""
    param_dtype: str = field("float32", choices=FLOAT_DTYPES, affects=AFFECTS)
    """Storage of all the rest: float32, bfloat16 or float16."""
    compute_dtype: str = field("bfloat16", choices=FLOAT_DTYPES, affects=AFFECTS)
    """Dtype of activations; norms, softmax and the encoder's output are float32 throughout."""
    attention: str = field("auto", choices=KERNELS, affects=AFFECTS)
    """Attention kernel: xla, cudnn, splash, splash_interpret or chunked; auto is chosen by the devices."""

    def __post_init__(self):
        check_fields(self)
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}")

    def for_devices(self, devices: Iterable[Any]) -> "EncoderConfig":
        """The same with the attention kernel resolved for the devices that the encoder is made for."""
        head_dim = self.hidden_size // self.num_heads
        kernel = resolve_for_devices(self.attention, devices, causal=False, head_dim=head_dim, dtype=self.compute_dtype)
        return dataclasses.replace(self, attention=kernel)


@dataclass(frozen=True, slots=True, kw_only=True)
class VitConfig(EncoderConfig):
    """An encoder of square images cut into square patches."""

    image_size: int = field(224, gt=0)
    """Pixels along each side."""
    patch_size: int = field(16, gt=0)
    """Pixels along each side of a patch."""

    def __post_init__(self):
        EncoderConfig.__post_init__(self)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")

    @property
    def grid(self) -> int:
        """Patches along each side."""
        return self.image_size // self.patch_size


def gelu(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The exact GELU (arXiv:1606.08415), computed in float32; for TPUs in bfloat16 by `gelu_by_logistic`."""
    if x.dtype != jnp.bfloat16:
        return gelu_by_erf(x)
    return jax.lax.platform_dependent(x, tpu=gelu_by_logistic, default=gelu_by_erf)


def gelu_by_erf(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """x Φ(x) with Φ(x) = (1 + erf(x / sqrt(2))) / 2; by erf, which costs TPUs less than JAX's erfc."""
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * np.float32(0.5**0.5)))).astype(x.dtype)


def gelu_by_logistic(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """x Φ(x) with Φ(x) = 1 / (1 + exp(-x P(x²))): TPUs compute exp and the reciprocal beside their vector unit, which
    has several times as much to do for erf.

    log(Φ(x) / (1 - Φ(x))) is an odd function of x, so that x P(x²) with a polynomial P approximates it. This P has the
    least relative error of Φ for x from -5.5 on, 0.17 %, less than bfloat16's rounding (0.39 %); nothing cancels in
    the tail. Before -5.5 the result is below 1.1e-7, and off by less than 5e-10.
    """
    y = x.astype(jnp.float32)
    square = jnp.square(y)
    logit = y * functools.reduce(lambda value, coefficient: value * square + coefficient, GELU_LOGIT)
    return (y * jax.nn.sigmoid(logit)).astype(x.dtype)


class Attention(nnx.Module):
    """Bidirectional attention. Queries, values and the output have biases, keys if `key_bias`."""

    def __init__(self, config: EncoderConfig, *, key_bias: bool, rngs: nnx.Rngs):
        self.config = config
        linear = lambda axes, has_bias=True: Linear(
            config.hidden_size,
            config.hidden_size,
            axes=axes,
            kernel_dtype=config.kernel_dtype,
            bias_dtype=config.param_dtype if has_bias else None,
            num_layers=config.num_layers,
            rngs=rngs,
        )
        self.q_proj = linear(("embed", "heads"))
        self.k_proj = linear(("embed", "heads"), has_bias=key_bias)
        self.v_proj = linear(("embed", "heads"))
        self.o_proj = linear(("heads", "embed"))

    def __call__(self, x: Float[Array, "B T D"], lengths: Int[Array, " B"] | None) -> Float[Array, "B T D"]:
        q, k, v = (
            constrain(proj(x, heads=self.config.num_heads), "batch", None, "heads", None)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = bidirectional_attention(q, k, v, lengths, kernel=self.config.attention)
        return self.o_proj(y.reshape(x.shape))


class MLP(nnx.Module):
    """down(gelu(up(x)))."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        common = {
            "kernel_dtype": config.kernel_dtype,
            "bias_dtype": config.param_dtype,
            "num_layers": config.num_layers,
            "rngs": rngs,
        }
        self.up_proj = Linear(d, f, axes=("embed", "mlp"), **common)
        self.down_proj = Linear(f, d, axes=("mlp", "embed"), **common)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down_proj(constrain(computed_once(gelu(self.up_proj(x))), "batch", None, "mlp"))


class Block(nnx.Module):
    """One encoder layer, its norms before attention and MLP, or after the additions (`norm_first` false)."""

    def __init__(self, config: EncoderConfig, *, key_bias: bool, norm_first: bool, rngs: nnx.Rngs):
        self.norm_first = norm_first
        norm = lambda: LayerNorm(
            config.hidden_size, epsilon=config.layer_norm_eps, dtype=config.param_dtype, num_layers=config.num_layers
        )
        self.attn_norm, self.mlp_norm = norm(), norm()
        self.attn = Attention(config, key_bias=key_bias, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], lengths: Int[Array, " B"] | None = None) -> Float[Array, "B T D"]:
        if self.norm_first:
            x = constrain(x + self.attn(self.attn_norm(x), lengths), "batch", None, None)
            return constrain(x + self.mlp(self.mlp_norm(x)), "batch", None, None)
        x = constrain(self.attn_norm(x + self.attn(x, lengths)), "batch", None, None)
        return constrain(self.mlp_norm(x + self.mlp(x)), "batch", None, None)


def run_blocks(
    blocks: Block, x: Float[Array, "B T D"], lengths: Int[Array, " B"] | None = None, *, count: int | None = None
) -> Float[Array, "B T D"]:
    """Runs stacked blocks, all or the first `count`. Tokens of row b beyond `lengths[b]` are masked in attention."""
    graphdef, params = nnx.split(blocks)
    if count is not None:
        params = jax.tree.map(lambda stacked: stacked[:count], params)
    batch, length, _ = x.shape
    if padding := splash_padding(length) if blocks.attn.config.attention.startswith("splash") else 0:
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))  # once, not in every layer
        lengths = jnp.full(batch, length) if lengths is None else lengths

    def step(x, layer):
        return nnx.merge(graphdef, layer, copy=True)(x, lengths), None

    return jax.lax.scan(step, constrain(x, "batch", None, None), params)[0][:, :length]


class PatchEmbed(nnx.Module):
    """A linear map of the pixels of each patch (a convolution without overlap).

    The kernel is [t p p 3, D], for patches of p x p pixels in t frames, the channels last.
    """

    def __init__(self, config: VitConfig, *, frames: int = 1, rngs: nnx.Rngs):
        self.size = (frames, config.patch_size)
        self.proj = Linear(
            frames * config.patch_size**2 * 3,
            config.hidden_size,
            axes=(None, "embed"),
            kernel_dtype=config.param_dtype,
            bias_dtype=config.param_dtype,
            rngs=rngs,
        )

    def __call__(self, pixels: Float[Array, "B t I J 3"]) -> Float[Array, "B P D"]:
        """Patches in the order of time, rows, columns."""
        (t, p), (batch, frames, height, width, _) = self.size, pixels.shape
        x = pixels.reshape(batch, frames // t, t, height // p, p, width // p, p, 3)
        return self.proj(x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, -1, t * p * p * 3))


class ImageEmbed(nnx.Module):
    """Patches of an image behind a class token, with learned (or stored) positions."""

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.patches = PatchEmbed(config, rngs=rngs)
        make = lambda *shape: normal(rngs.params(), shape, 0.02).astype(config.param_dtype)
        self.cls_token = param(make(config.hidden_size), ("embed",))
        self.positions = param(make(1 + config.grid**2, config.hidden_size), (None, "embed"))

    def __call__(self, pixels: Float[Array, "B I J 3"]) -> Float[Array, "B T D"]:
        """Tokens in the compute dtype: the class token, then the patches row by row."""
        x = self.patches(pixels[:, None].astype(self.config.compute_dtype))
        cls = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        return jnp.concatenate([cls, x], axis=1) + self.positions[...].astype(x.dtype)


def normalize(
    frames: UInt8[Array, "*B I J 3"], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Float[Array, "*B I J 3"]:
    """Pixels from 0 to 255 to float32 of about zero mean and unit variance, channel by channel."""
    scale = 1 / (255 * np.array(std))
    offset = -np.array(mean) / np.array(std)
    return frames.astype(jnp.float32) * scale.astype(np.float32) + offset.astype(np.float32)
