"""Layers against plain NumPy in float64, and kernels stored in few bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax.models.layers import (
    QUANTISED,
    Embedding,
    LayerNorm,
    Linear,
    RMSNorm,
    as_array,
    as_int8,
    as_kernel,
    computed_once,
    cos_and_sin,
    int8_matmul,
    join_by_tiles,
    join_heads,
    matmul,
    rotary_angles,
    rotate,
    split_by_tiles,
    split_heads,
    stored_by_rows,
    swap_by_product,
    swiglu,
)
from emollama_jax.models.llama import Llama
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.weights.engine import param_values, set_params
from tests.models.tiny import close, random_llama, rows, tiny_config

# The 16 numbers of NF4 (QLoRA, arXiv:2305.14314, appendix E).
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
    + [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    + [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)


def relative(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


# ---- norm and rotary embedding


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_rms_norm(epsilon):
    norm = RMSNorm(12, epsilon=epsilon, dtype="float32")
    np.testing.assert_array_equal(norm.scale[...], 1)
    random = np.random.default_rng(0)
    norm.scale[...] = jnp.asarray(random.normal(size=12), jnp.float32)
    x = random.normal(size=(3, 5, 12)).astype(np.float32)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + epsilon) * np.asarray(norm.scale[...], np.float64)
    close(norm(jnp.asarray(x)), expected, 1e-6, "RMS norm")


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_layer_norm(epsilon):
    norm = LayerNorm(12, epsilon=epsilon, dtype="float32")
    np.testing.assert_array_equal(norm.scale[...], 1)
    np.testing.assert_array_equal(norm.bias[...], 0)
    random = np.random.default_rng(0)
    norm.scale[...], norm.bias[...] = (jnp.asarray(random.normal(size=12), jnp.float32) for _ in range(2))
    x = 50 + random.normal(size=(3, 5, 12)).astype(np.float32)
    wide, scale, bias = (np.asarray(a, np.float64) for a in (x, norm.scale[...], norm.bias[...]))
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + epsilon) * scale + bias
    close(norm(jnp.asarray(x)), expected, 1e-5, "layer norm")
    assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_layer_norm_of_half_precision_is_computed_in_float32():
    """Also with a mean that is 300 times the deviation, of values whose squares and whose sum bfloat16 could not
    hold."""
    noise = np.random.default_rng(0).normal(size=(4, 512))
    for mean in (0, 3, 300):
        x = jnp.asarray(mean + noise, jnp.bfloat16)
        y = LayerNorm(512, epsilon=1e-5, dtype="bfloat16")(x)
        assert y.dtype == jnp.bfloat16
        wide = np.asarray(x, np.float64)
        expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
        error = np.abs(np.asarray(y, np.float64) - expected).max() / np.abs(expected).max()
        print(f"mean {mean}: relative error {error:.1e}")
        assert error < 2**-8
    assert np.all(LayerNorm(512, epsilon=1e-5, dtype="bfloat16")(jnp.full((1, 512), 300.7, jnp.bfloat16)) == 0)


def test_a_linear_layer_has_a_bias_where_it_is_given_a_dtype():
    linear = functools.partial(Linear, 4, 6, axes=("embed", "mlp"), kernel_dtype="float32", rngs=nnx.Rngs(0))
    assert linear().bias is None
    layer = linear(bias_dtype="float32", num_layers=3)
    assert layer.bias.shape == (3, 6)
    assert layer.bias.get_metadata("out_sharding") == ("layers", "mlp")
    layer = linear(bias_dtype="float32")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32)
    without = layer(x)
    layer.bias[...] = jnp.arange(6, dtype=jnp.float32)
    close(layer(x) - without, np.broadcast_to(np.arange(6), (2, 6)), 1e-6, "bias")


def test_rms_norm_of_half_precision_is_computed_in_float32():
    """Values whose squares and whose sum bfloat16 could not hold."""
    x = jnp.asarray(300 + np.random.default_rng(0).normal(size=(4, 512)), jnp.bfloat16)
    y = RMSNorm(512, epsilon=1e-5, dtype="bfloat16")(x)
    assert y.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + 1e-5)
    np.testing.assert_array_equal(y, jnp.asarray(expected, jnp.float32).astype(jnp.bfloat16))


@pytest.mark.parametrize("theta", [1e4, 1e5])
def test_rotary_embedding_is_a_rotation_of_complex_numbers(theta):
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 9, 3, 10)).astype(np.float32)
    positions = random.integers(0, 40, (2, 9))
    angles = positions[..., None] * theta ** (-np.arange(0, 10, 2) / 10)
    turned = (x[..., :5] + 1j * x[..., 5:]) * np.exp(1j * angles)[:, :, None]
    ours = rotate(jnp.asarray(x), cos_and_sin(rotary_angles(jnp.asarray(positions), 10, theta)))
    close(ours, np.concatenate([turned.real, turned.imag], -1), 1e-5, "rotated")


def test_rotary_angles_stay_exact_to_the_last_bit_of_float32_at_far_positions():
    positions = np.arange(0, 4096, 91)
    angles = rotary_angles(jnp.asarray(positions)[None], 128, 1e4)[0, :, 0]
    expected = positions[:, None] * 1e4 ** (-np.arange(0, 128, 2) / 128)
    assert relative(angles, expected) < 2**-23
    assert np.max(np.abs(angles - expected)) <= 4096 * 2**-23
    half = rotate(jnp.ones((1, len(positions), 1, 128), jnp.bfloat16), cos_and_sin(angles[None, :, None]))
    assert half.dtype == jnp.bfloat16
    both = np.concatenate([np.cos(expected) - np.sin(expected), np.cos(expected) + np.sin(expected)], -1)
    assert np.max(np.abs(np.asarray(half[0, :, 0], np.float64) - both)) < 2**-8 * 1.5  # bfloat16's rounding


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_halves_change_places_in_a_product_without_rounding(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 2, 128)), dtype)
    np.testing.assert_array_equal(swap_by_product(x), np.concatenate([x[..., 64:], x[..., :64]], -1))


# ---- initial values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", *QUANTISED])
def test_initial_kernels(dtype):
    """Normal with the standard deviation asked for, other numbers in each layer, whatever they are stored as."""
    options = {"axes": ("embed", "mlp"), "kernel_dtype": dtype, "init_std": 0.1, "num_layers": 3}
    layer = nnx.jit(lambda: Linear(64, 48, **options, rngs=nnx.Rngs(0)))()
    kernel = np.asarray(as_array(layer.kernel.get_value()), np.float64)
    assert kernel.shape == (3, 64, 48)
    assert np.std(kernel) == pytest.approx(0.1, rel=0.05)
    assert abs(np.mean(kernel)) < 0.005
    assert abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.1
    assert layer.kernel.get_metadata("out_sharding") == ("layers", "embed", "mlp")


def test_embedding_looks_rows_up():
    embed = Embedding(7, 4, dtype="bfloat16", rngs=nnx.Rngs(0))
    tokens = jnp.array([[6, 0], [3, 3]])
    table = np.asarray(embed.embedding[...], np.float32)
    np.testing.assert_array_equal(np.asarray(embed(tokens), np.float32), table[np.asarray(tokens)])
    assert embed(tokens).dtype == jnp.bfloat16


# ---- quantised kernels

SHAPES = [(192, 40), (100, 48)]  # inputs that are a multiple of NF4's 64, and that are not
quantise = jax.jit(as_kernel, static_argnums=1)


def weight(shape: tuple[int, int]) -> np.ndarray:
    """Normal numbers with channels of very different size."""
    random = np.random.default_rng(0)
    return (random.normal(size=shape) * 10 ** random.uniform(-3, 1, shape[1])).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_the_nearest_of_256_levels_per_output_channel(shape):
    w = weight(shape)
    kernel = quantise(jnp.asarray(w), "int8")
    assert kernel.qvalue.dtype == jnp.int8 and kernel.qvalue.shape == kernel.shape == shape
    assert kernel.scale.dtype == jnp.float32 and kernel.scale.shape == (1, shape[1])
    largest = np.max(np.abs(w), axis=0)
    error = np.abs(np.asarray(as_array(kernel), np.float64) - w)
    assert np.all(error <= largest / 254)
    print(f"int8 {shape}: relative error {relative(as_array(kernel), w):.4f}")
    assert relative(as_array(kernel) / largest, w / largest) < 0.009


@pytest.mark.smoke
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_is_the_nearest_of_its_16_levels_per_block(shape):
    w = weight(shape)
    kernel = quantise(jnp.asarray(w), "nf4")
    block = 64 if shape[0] % 64 == 0 else shape[0]
    assert kernel.qvalue.dtype == jnp.uint4 and kernel.qvalue.shape == kernel.shape == shape
    assert kernel.scale.dtype == jnp.float32 and kernel.scale.shape == (shape[0] // block, shape[1])
    blocks = w.astype(np.float64).reshape(-1, block, shape[1])
    largest = np.max(np.abs(blocks), axis=1, keepdims=True)
    nearest = NF4[np.argmin(np.abs((blocks / largest)[..., None] - NF4), axis=-1)] * largest
    found = np.asarray(as_array(kernel), np.float64).reshape(blocks.shape)
    np.testing.assert_allclose(found, nearest, rtol=0, atol=1e-6 * np.max(largest))
    print(f"nf4 {shape}: relative error {relative(found, blocks):.4f}")
    assert relative(found / largest, blocks / largest) < 0.1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.009), ("nf4", 0.1)])
def test_matmul_and_its_gradient_through_a_quantised_kernel(dtype, bound, shape):
    """Both are those of the dequantised kernel, and near those of the original one."""
    w = jnp.asarray(weight(shape))
    kernel = quantise(w, dtype)
    x = jax.random.normal(jax.random.key(1), (2, 5, shape[0]))
    loss = jax.jit(jax.value_and_grad(lambda x, kernel: jnp.sum(jnp.square(matmul(x, kernel))) / 2))
    value, gradient = loss(x, kernel)
    plain_value, plain_gradient = loss(x, as_array(kernel))
    np.testing.assert_allclose(matmul(x, kernel), x @ as_array(kernel), rtol=0, atol=1e-5 * jnp.max(jnp.abs(x @ w)))
    np.testing.assert_allclose(value, plain_value, rtol=1e-6)
    assert relative(gradient, plain_gradient) < 1e-6
    by_channel = np.max(np.abs(w), axis=0)
    error = relative(matmul(x, kernel) / by_channel, x @ w / by_channel)
    print(f"{dtype} {shape}: relative error of the output {error:.4f}")
    assert error < bound


def rounded(x: np.ndarray) -> np.ndarray:
    """As `as_int8` rounds, by half of one of 256 levels at most, of each token by itself."""
    found = np.asarray(as_array(as_int8(jnp.asarray(x, jnp.float32))), np.float64)
    level = np.max(np.abs(x), axis=-1, keepdims=True) / 127.5
    assert np.all(np.abs(found - x) <= 0.501 * level)
    return found


@pytest.mark.parametrize("backward", [False, True])
def test_products_of_integers_and_their_gradients(backward):
    """Each token is rounded by a scale of its own, so that no other counts."""
    random = np.random.default_rng(0)
    x, g = random.normal(size=(2, 5, 256)), random.normal(size=(2, 5, 192))
    x[1] *= 100
    kernel = as_kernel(jnp.asarray(random.normal(size=(256, 192)), jnp.float32), "int8")
    y, pull = jax.vjp(lambda x: int8_matmul(x, kernel, backward), jnp.asarray(x, jnp.float32))
    weights = np.asarray(as_array(kernel), np.float64)
    assert relative(y, rounded(x) @ weights) < 1e-4
    scaled = g * np.asarray(kernel.scale, np.float64)
    expected = rounded(scaled) @ np.asarray(kernel.qvalue, np.float64).T if backward else g @ weights.T
    assert relative(pull(jnp.asarray(g, jnp.float32))[0], expected) < 1e-4
    alone = int8_matmul(jnp.asarray(x[:1], jnp.float32), kernel, backward)
    np.testing.assert_array_equal(alone, y[:1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_float_kernels_are_cast_and_multiplied_in_the_dtype_of_x(dtype):
    w = jax.random.normal(jax.random.key(0), (8, 6))
    kernel = as_kernel(w, dtype)
    assert kernel.dtype == dtype and as_array(kernel) is kernel
    x = jax.random.normal(jax.random.key(1), (3, 8), jnp.bfloat16)
    assert matmul(x, kernel).dtype == jnp.bfloat16
    assert matmul(x.astype(jnp.float32), kernel).dtype == jnp.float32


@pytest.mark.parametrize("dtype", QUANTISED)
def test_stacked_kernels_are_stored_layer_by_layer(dtype):
    w = jax.random.normal(jax.random.key(0), (3, 128, 8))
    together = jax.vmap(lambda w: as_kernel(w, dtype))(w)
    assert together.shape == w.shape
    apart = jnp.stack([as_array(quantise(layer, dtype)) for layer in w])
    np.testing.assert_array_equal(as_array(together), apart)


@functools.partial(jax.jit, static_argnums=0)
def hidden_and_gradient(graphdef, state, x):
    def loss(x):
        model: Llama = nnx.merge(graphdef, state)
        tokens, positions, segment_ids = rows(model.config)
        hidden = model(x, positions, segment_ids)
        return jnp.sum(model.token_nll(hidden, tokens)), hidden

    gradient, hidden = jax.grad(loss, has_aux=True)(x)
    return hidden, gradient


# Bounds of the relative errors of a whole random model's hidden states and input gradient, against float32.
WHOLE = {"int8": (0.015, 0.03), "nf4": (0.2, 0.35)}


@pytest.mark.parametrize("dtype", QUANTISED)
def test_whole_model_with_quantised_kernels(dtype):
    """It is exactly the model of the dequantised kernels, and near the original one."""
    lora, sizes = LoRAConfig(rank=4, alpha=4.0), {"hidden_size": 64, "intermediate_size": 192}
    graphdef, original = nnx.split(random_llama(tiny_config(**sizes), lora))
    quantised = random_llama(tiny_config(**sizes, kernel_dtype=dtype), lora)
    state = nnx.state(quantised)
    set_params(state, {path: as_array(value) for path, value in param_values(state).items()})
    x = jax.random.normal(jax.random.key(0), (2, 13, 64))
    found = hidden_and_gradient(*nnx.split(quantised), x)
    dequantised = hidden_and_gradient(graphdef, state, x)
    expected = hidden_and_gradient(graphdef, original, x)
    for i, what in enumerate(("hidden states", "gradient")):
        close(found[i], dequantised[i], 1e-5, f"{dtype}: {what}, against the dequantised kernels")
        error = relative(found[i], expected[i])
        print(f"{dtype}: {what}, relative error against the original kernels {error:.4f}")
        assert error < WHOLE[dtype][i]


@pytest.mark.parametrize("stored", [computed_once, stored_by_rows])
def test_results_are_stored_on_tpus_alone(stored):
    traced = jax.jit(stored).trace(jnp.ones((16, 8)))
    lowered = lambda platform: traced.lower(lowering_platforms=(platform,)).as_text()
    assert "optimization_barrier" in lowered("tpu")
    assert "optimization_barrier" not in lowered("cpu")


def test_heads_that_move_by_tiles_are_those_of_a_reshape():
    x = jax.random.normal(jax.random.key(0), (2, 24, 3 * 128))
    plain = x.reshape(2, 24, 3, 128)
    for cut in (split_heads(x, 3), split_by_tiles(x, 3)):
        np.testing.assert_array_equal(cut, plain)
    for joined in (join_heads(plain), join_by_tiles(plain)):
        np.testing.assert_array_equal(joined, x)
    weights = jax.random.normal(jax.random.key(1), plain.shape)
    gradient = jax.grad(lambda x: jnp.sum(weights * split_by_tiles(x, 3)))(x)
    np.testing.assert_array_equal(gradient, weights.reshape(x.shape))


@pytest.mark.parametrize("length, head_dim, by_tiles", [(24, 128, True), (23, 128, False), (24, 64, False)])
def test_only_heads_that_fill_tiles_move_by_tiles(length, head_dim, by_tiles):
    there_and_back = jax.jit(lambda x: join_heads(split_heads(x, 2)))
    lowered = there_and_back.trace(jnp.ones((1, length, 2 * head_dim))).lower(lowering_platforms=("tpu",)).as_text()
    assert ("optimization_barrier" in lowered) == by_tiles


@pytest.mark.parametrize("bias_dtype", [None, "float32"])
def test_a_linear_layer_cuts_its_outputs_into_heads(bias_dtype):
    layer = Linear(6, 12, axes=("embed", "heads"), kernel_dtype="float32", bias_dtype=bias_dtype, rngs=nnx.Rngs(0))
    if bias_dtype:
        layer.bias[...] = jnp.arange(12.0)
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    np.testing.assert_array_equal(layer(x, heads=3), layer(x).reshape(2, 5, 3, 4))


@pytest.mark.parametrize("shape", [(4, 6), (2, 16, 6)])
def test_swiglu_and_its_gradients(shape):
    gate, up, weights = jax.random.normal(jax.random.key(0), (3, *shape))
    plain = lambda gate, up: jnp.sum(jax.nn.silu(gate) * up * weights)
    found = jax.value_and_grad(lambda gate, up: jnp.sum(swiglu(gate, up) * weights), (0, 1))(gate, up)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6),
        found,
        jax.value_and_grad(plain, (0, 1))(gate, up),
    )
