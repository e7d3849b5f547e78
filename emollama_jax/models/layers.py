"""Layers shared by all transformers.

Axes: B batch, T tokens, D width, N heads, H head size, L layers (leading, when a layer's parameters are stacked).
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

Arrays = TypeVar("Arrays")  # an array, or a tuple of arrays

NF4_TILE = 64  # weights that share one scale, along the input axis (QLoRA, arXiv:2305.14314)
TILE_ROWS, TILE_COLUMNS = 8, 128  # of the tiles in which TPUs store arrays
QUANTISED = ("int8", "nf4")
FLOAT_DTYPES = ("float32", "bfloat16", "float16")
INT8_PRODUCTS = ("none", "forward", "all")
INT8_PRODUCT = "int8_product"  # by which a policy of recomputation knows what `int8_matmul` returns


def param(value, axes: tuple[str | None, ...], kind: type[nnx.Param] = nnx.Param) -> nnx.Param:
    """A parameter with one logical axis name a dimension. `sharding.py` maps the names to a mesh."""
    return kind(value, out_sharding=axes, eager_sharding=False)


def stacked(init: Callable[[jax.Array], Array], key: jax.Array, num_layers: int | None):
    """`init(key)` for one layer; for several, stacked along a leading axis, initialised one after another."""
    return init(key) if num_layers is None else jax.lax.map(init, jax.random.split(key, num_layers))


def stacked_axes(axes: tuple[str | None, ...], num_layers: int | None) -> tuple[str | None, ...]:
    return axes if num_layers is None else ("layers", *axes)


def normal(key: jax.Array, shape: tuple[int, ...], std: float) -> Float[Array, "..."]:
    """Normal initial values; float32 also where `JAX_ENABLE_X64` makes float64 JAX's default."""
    return std * jax.random.normal(key, shape, jnp.float32)


def computed_once(x: Arrays) -> Arrays:
    """The same arrays. On TPUs they, and their gradients, are computed and stored before anything reads them: XLA would
    compute them anew for every tile of the matrix products that do."""
    return jax.lax.platform_dependent(x, tpu=jax.lax.optimization_barrier, default=lambda x: x)


def stored_by_rows(x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
    """`computed_once`, whose result TPUs store row by row: of rows cut into tiles, XLA does not choose columns, which
    would have to be turned for what is computed from them."""
    if x.ndim < 2 or x.shape[-2] % TILE_ROWS:
        return computed_once(x)
    return computed_once(x.reshape(*x.shape[:-2], -1, TILE_ROWS, x.shape[-1])).reshape(x.shape)


def split_heads(x: Float[Array, "B T NH"], heads: int) -> Float[Array, "B T N H"]:
    """Cuts the last axis into heads."""
    plain = lambda x: x.reshape(*x.shape[:2], heads, -1)
    if not _fills_tiles(x.shape[1], x.shape[2] // heads):
        return plain(x)
    return jax.lax.platform_dependent(x, tpu=functools.partial(split_by_tiles, heads=heads), default=plain)


def join_heads(x: Float[Array, "B T N H"]) -> Float[Array, "B T NH"]:
    """The inverse of `split_heads`."""
    plain = lambda x: x.reshape(*x.shape[:2], -1)
    if not _fills_tiles(x.shape[1], x.shape[3]):
        return plain(x)
    return jax.lax.platform_dependent(x, tpu=join_by_tiles, default=plain)


def split_by_tiles(x: Float[Array, "B T NH"], heads: int) -> Float[Array, "B T N H"]:
    """`split_heads` for T and H that fill tiles, which are moved whole to where attention reads them, [B, N, T, H]: XLA
    on its own turns every tile, and turns it back."""
    batch, length, width = x.shape
    x = computed_once(x).reshape(batch, -1, TILE_ROWS, heads, width // heads).transpose(0, 3, 1, 2, 4)
    return x.reshape(batch, heads, length, -1).swapaxes(1, 2)


def join_by_tiles(x: Float[Array, "B T N H"]) -> Float[Array, "B T NH"]:
    """The inverse of `split_by_tiles`."""
    batch, length, heads, size = x.shape
    x = x.swapaxes(1, 2).reshape(batch, heads, -1, TILE_ROWS, size).transpose(0, 2, 3, 1, 4)
    return computed_once(x.reshape(batch, length, -1))


def _fills_tiles(length: int, head_dim: int) -> bool:
    return length % TILE_ROWS == 0 and head_dim % TILE_COLUMNS == 0


@jax.custom_vjp
def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """silu(gate) * up (arXiv:2002.05202)."""
    return computed_once(_swiglu(gate, up))


def _swiglu(gate, up):
    return jax.nn.silu(gate) * up


def _swiglu_backward(inputs, gradient):
    return computed_once(jax.vjp(_swiglu, *inputs)[1](stored_by_rows(gradient)))


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


def as_kernel(weight: Float[Array, "in out"], dtype: str) -> Array | qwix.QArray:
    """A weight as it is stored: cast to a float dtype, or quantised with float32 scales.

    `int8`: symmetric, one scale an output channel. `nf4`: 4-bit normal floats, one scale for each 64 inputs of an
    output channel (one an output channel where the inputs are not a multiple of 64).
    """
    if dtype not in QUANTISED:
        return weight.astype(dtype)
    tile = {0: NF4_TILE} if dtype == "nf4" and weight.shape[0] % NF4_TILE == 0 else {}
    return qwix.quantize(weight.astype(jnp.float32), dtype, channelwise_axes=(1,), tiled_axes=tile)


def as_array(kernel: Array | qwix.QArray) -> Array:
    """A stored kernel as plain numbers: the inverse of `as_kernel`, up to its rounding."""
    return qwix.dequantize(kernel) if isinstance(kernel, qwix.QArray) else kernel


def matmul(x: Float[Array, "*B in"], kernel: Array | qwix.QArray) -> Float[Array, "*B out"]:
    """`x @ kernel` in x's dtype, whatever the kernel is stored as."""
    return qwix.dot_general(x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))


def as_int8(x: Float[Array, "*B in"]) -> qwix.QArray:
    """Activations rounded to 8 bits: symmetric, one scale a token."""
    return qwix.quantize(x, "int8", channelwise_axes=tuple(range(x.ndim - 1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def int8_matmul(x: Float[Array, "*B in"], kernel: qwix.QArray, backward: bool) -> Float[Array, "*B out"]:
    """`x @ kernel` in x's dtype by a product of 8-bit integers, x rounded by `as_int8`.

    The gradient of x is that of `matmul`; with `backward` it is such a product, too, of the output's gradient times
    the kernel's scales, rounded. The kernel has no gradient.
    """
    y = qwix.dot_general(as_int8(x), kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=x.dtype)
    return y.astype(x.dtype)


def _int8_forward(x, kernel, backward):
    return int8_matmul(x, kernel, backward), kernel


def _int8_backward(backward, kernel, gradient):
    of_outputs = (((gradient.ndim - 1,), (1,)), ((), ()))
    if backward:
        rounded = as_int8(gradient * kernel.scale[0].astype(gradient.dtype))
        of_x = qwix.dot_general(rounded, kernel.qvalue, of_outputs, preferred_element_type=gradient.dtype)
    else:
        of_x = qwix.dot_general(gradient, kernel.astype(gradient.dtype), of_outputs)
    return of_x.astype(gradient.dtype), None


int8_matmul.defvjp(_int8_forward, _int8_backward)


class Linear(nnx.Module):
    """y = x W, or x W + b where the bias has a dtype. W is [in, out], b [out]; a leading L when stacked."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        kernel_dtype: str,
        bias_dtype: str | None = None,
        init_std: float = 0.02,
        int8_products: str = "none",
        num_layers: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.int8_products = int8_products

        def init(key):
            return as_kernel(normal(key, (in_features, out_features), init_std), kernel_dtype)

        self.kernel = param(stacked(init, rngs.params(), num_layers), stacked_axes(axes, num_layers))
        shape = (out_features,) if num_layers is None else (num_layers, out_features)
        self.bias = bias_dtype and param(jnp.zeros(shape, bias_dtype), stacked_axes(axes[1:], num_layers))

    def __call__(
        self, x: Float[Array, "*B in"], *, heads: int | None = None
    ) -> Float[Array, "*B out"] | Float[Array, "*B N H"]:
        """With `heads` the outputs are cut into so many before the bias is added: TPUs then write the product as
        attention reads it."""
        kernel = self.kernel.get_value()
        if self.int8_products == "none":
            y = matmul(x, kernel)
        else:
            y = checkpoint_name(int8_matmul(x, kernel, self.int8_products == "all"), INT8_PRODUCT)
        cut = lambda y: y if heads is None else y.reshape(*y.shape[:-1], heads, -1)
        return cut(y) if self.bias is None else cut(y) + cut(self.bias[...].astype(x.dtype))


class RMSNorm(nnx.Module):
    """Root mean square norm in float32 (arXiv:1910.07467); the result has x's dtype."""

    def __init__(self, features: int, *, epsilon: float, dtype: str, num_layers: int | None = None):
        self.epsilon = epsilon
        shape = (features,) if num_layers is None else (num_layers, features)
        self.scale = param(jnp.ones(shape, dtype), stacked_axes((None,), num_layers))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.epsilon)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm in float32 (arXiv:1607.06450); the result has x's dtype."""

    def __init__(self, features: int, *, epsilon: float, dtype: str, num_layers: int | None = None):
        self.epsilon = epsilon
        shape = (features,) if num_layers is None else (num_layers, features)
        self.scale = param(jnp.ones(shape, dtype), stacked_axes((None,), num_layers))
        self.bias = param(jnp.zeros(shape, dtype), stacked_axes((None,), num_layers))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = x.astype(jnp.float32)
        mean = jnp.mean(y, -1, keepdims=True)
        if x.dtype == jnp.float32:
            variance = jnp.mean(jnp.square(y - mean), -1, keepdims=True)
        else:  # in one pass with the mean, where what cancels is less than x was rounded by
            variance = jnp.maximum(jnp.mean(jnp.square(y), -1, keepdims=True) - jnp.square(mean), 0)
        y = (y - mean) * jax.lax.rsqrt(variance + self.epsilon)
        y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class Embedding(nnx.Module):
    """Token vectors [V, D]."""

    def __init__(self, vocab_size: int, features: int, *, dtype: str, init_std: float = 0.02, rngs: nnx.Rngs):
        table = normal(rngs.params(), (vocab_size, features), init_std)
        self.embedding = param(table.astype(dtype), ("vocab", "embed"))

    def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        return self.embedding[...][tokens]


def rotary_angles(positions: Int[Array, "B T"], head_dim: int, theta: float) -> Float[Array, "B T 1 half"]:
    """Angles of rotary position embeddings (arXiv:2104.09864), float32."""
    frequencies = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return (positions.astype(jnp.float32)[..., None] * frequencies)[:, :, None, :]


def cos_and_sin(angles: Float[Array, "B T 1 half"]) -> Float[Array, "2 B T 1 H"]:
    """What `rotate` multiplies with, shared by all layers and heads: cosines, and sines with the sign of each half of a
    head."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.stack([jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)])


def rotate(x: Float[Array, "B T N H"], cos_sin: Float[Array, "2 B T 1 H"]) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + H/2), the layout of the Hugging Face LLaMA weights."""
    cos, sin = cos_sin
    swapped = jax.lax.platform_dependent(x, tpu=swap_by_product, default=swap_halves)
    return (x.astype(jnp.float32) * cos + swapped.astype(jnp.float32) * sin).astype(x.dtype)


def swap_halves(x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """The second half of the last axis before the first."""
    return jnp.roll(x, x.shape[-1] // 2, axis=-1)


def swap_by_product(x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """`swap_halves` by the matrix unit, without rounding: to move half a register's lanes takes a TPU longer."""
    permutation = swap_halves(jnp.eye(x.shape[-1], dtype=x.dtype))
    return jnp.matmul(x, permutation, precision="highest")
