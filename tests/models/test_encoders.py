"""The encoders: every field of their settings has an effect, values out of range are refused, half precision stays
near. What they compute is held against torch in tests/parity."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax.bench.encode import random_inputs
from emollama_jax.config import load_config
from emollama_jax.models.videomae import sine_positions
from emollama_jax.models.vit import gelu, gelu_by_logistic
from emollama_jax.sharding import abstract
from emollama_jax.weights.encoders import ENCODERS, random_encoder
from emollama_jax.weights.engine import param_values
from tests.models.tiny import close

TINY = load_config("tiny")
SECONDS = 1


def computation(name: str, config) -> tuple[str, ...]:
    """Shapes and dtypes of the parameters, and the operations of `encode`."""
    graphdef, state = abstract(lambda: ENCODERS[name](config, rngs=nnx.Rngs(0)))
    encode = lambda state, *inputs: nnx.merge(graphdef, state).encode(*inputs)
    operations = jax.make_jaxpr(encode)(state, *random_inputs(config, 1, SECONDS, seed=0))
    shapes = {path: (value.shape, str(value.dtype)) for path, value in param_values(state).items()}
    return str(shapes), str(operations)


ENCODER_CHANGES = {
    "hidden_size": 96,
    "intermediate_size": 65,
    "num_layers": 4,
    "num_heads": 2,
    "layer_norm_eps": 2e-6,
    "kernel_dtype": "int8",
    "param_dtype": "bfloat16",
    "compute_dtype": "bfloat16",
    "attention": "chunked",
}
VIT_CHANGES = {**ENCODER_CHANGES, "image_size": 112, "patch_size": 4}
CHANGES = {
    "eva_vit": {**VIT_CHANGES, "output_norm_eps": 1e-3},
    "mae": {**VIT_CHANGES, "pool": "cls"},
    "videomae": {**VIT_CHANGES, "num_frames": 8, "tubelet_size": 1, "final_norm": False},
    "hubert": {
        **ENCODER_CHANGES,
        "conv_dims": (32,) * 6 + (16,),
        "conv_kernels": (10, 3, 3, 3, 3, 3, 2),
        "conv_strides": (5, 2, 2, 2, 2, 2, 1),
        "conv_norm": "group",
        "conv_bias": False,
        "feature_norm": False,
        "norm_first": False,
        "position_kernel": 15,
        "position_groups": 8,
        "layer": 1,
    },
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", ENCODERS)
def test_every_field_has_an_effect(name):
    config = getattr(TINY, name)
    assert set(CHANGES[name]) == {field.name for field in dataclasses.fields(config)}
    unchanged = computation(name, config)
    assert computation(name, dataclasses.replace(config)) == unchanged
    for field, value in CHANGES[name].items():
        assert getattr(config, field) != value
        assert computation(name, dataclasses.replace(config, **{field: value})) != unchanged, field


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        *((name, {"num_layers": 0}, "num_layers=0: must be above 0") for name in ENCODERS),
        ("mae", {"layer_norm_eps": 0.0}, "layer_norm_eps=0.0: must be above 0"),
        ("mae", {"num_heads": 5}, "hidden_size=32 must be a multiple of num_heads=5"),
        ("eva_vit", {"kernel_dtype": "int4"}, "kernel_dtype='int4': choose one of float32, bfloat16, float16,"),
        ("hubert", {"attention": "flash"}, "attention='flash': choose one of auto, xla, cudnn, splash"),
        ("videomae", {"patch_size": 15}, "image_size=32 must be a multiple of patch_size=15"),
        ("videomae", {"tubelet_size": 3}, "num_frames=4 must be a multiple of tubelet_size=3"),
        ("mae", {"pool": "max"}, "pool='max': choose one of mean, cls"),
        ("hubert", {"conv_norm": "batch"}, "conv_norm='batch': choose one of layer, group"),
        ("hubert", {"conv_dims": (32,) * 6}, "conv_dims, conv_kernels and conv_strides must hold one number"),
        ("hubert", {"conv_strides": (0,) * 7}, "conv_strides=(0, 0, 0, 0, 0, 0, 0): must be above 0"),
        ("hubert", {"layer": 3}, "layer=3: give 0 to num_layers=2, or -1 and down"),
        ("hubert", {"position_groups": 5}, "hidden_size=32 must be a multiple of position_groups=5"),
    ],
)
def test_values_refused(name, changes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        dataclasses.replace(getattr(TINY, name), **changes)


def test_hubert_counts_its_frames():
    config = TINY.hubert
    assert config.min_samples == 400
    assert [config.num_frames(n) for n in (399, 400, 719, 720, 16000)] == [0, 1, 1, 2, 49]


def test_sine_positions():
    positions = sine_positions(7, 6)
    assert positions.dtype == np.float32
    np.testing.assert_array_equal(positions[0], [0, 1, 0, 1, 0, 1])
    np.testing.assert_allclose(positions[5, 2:4], [np.sin(5 / 10000 ** (2 / 6)), np.cos(5 / 10000 ** (2 / 6))], 1e-6)


@pytest.mark.parametrize("name", ENCODERS)
def test_nothing_is_float64_where_that_is_the_default_of_jax(name):
    config = getattr(TINY, name)

    def encode(*inputs):
        model = ENCODERS[name](config, rngs=nnx.Rngs(0))
        return nnx.state(model), model.encode(*inputs)

    with jax.enable_x64(True):
        program = jax.make_jaxpr(encode)(*random_inputs(config, 2, SECONDS, seed=0))
    assert not re.findall(r"\S+ = .*f64.*", str(program))


@pytest.mark.parametrize("name", ENCODERS)
def test_half_precision_and_few_bits_stay_near(name):
    """The output is float32 whatever is computed in; bfloat16 and int8 kernels keep its direction."""
    config = getattr(TINY, name)
    inputs = [jnp.asarray(x) for x in random_inputs(config, 2, SECONDS, seed=0)]
    exact = np.asarray(jax.jit(random_encoder(name, config, 0).encode)(*inputs))
    exact = exact.reshape(-1, exact.shape[-1]).astype(np.float64)
    for changes in ({"compute_dtype": "bfloat16"}, {"kernel_dtype": "int8"}):
        model = random_encoder(name, dataclasses.replace(config, **changes), 0)
        found = jax.jit(model.encode)(*inputs)
        assert found.dtype == jnp.float32
        found = np.asarray(found, np.float64).reshape(exact.shape)
        cosine = (found * exact).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(exact, axis=1)
        assert 0.999 < cosine.min() < 1 - 1e-9, changes


def exact_gelu(x: np.ndarray) -> np.ndarray:
    return np.array([y * math.erfc(-y / math.sqrt(2)) / 2 for y in x.astype(np.float64)])


def test_gelu_is_exact_in_float32():
    x = np.linspace(-8, 8, 1001, dtype=np.float32)
    close(gelu(jnp.asarray(x)), exact_gelu(x), 1e-6, "gelu")


def test_gelu_for_tpus_is_gelu_to_the_last_bit_of_bfloat16():
    x = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)
    x = x[np.isfinite(x.astype(np.float32))]
    expected = exact_gelu(x)
    found = np.asarray(jax.jit(gelu_by_logistic)(jnp.asarray(x)))
    assert found.dtype == jnp.bfloat16
    error = np.abs(found.astype(np.float64) - expected)
    tail = x < -5.5
    assert error[tail].max() < 5e-10
    normal = ~tail & (np.abs(expected) >= 2.0**-126)
    assert error[~tail & ~normal].max() < 2.0**-126
    bits = lambda y: y[normal].view(np.int16).astype(np.int32)
    apart = np.abs(bits(found) - bits(expected.astype(jnp.bfloat16)))
    print(f"at most {apart.max()} bit apart, which {np.mean(apart > 0):.2%} of the numbers from -5.5 on are")
    assert apart.max() == 1 and np.mean(apart > 0) < 0.003
    slope = jax.vmap(jax.grad(lambda y: gelu_by_logistic(y).astype(jnp.float32)))(jnp.asarray(x[np.abs(x) < 1e6]))
    assert np.all(np.isfinite(slope))


def test_only_bfloat16_on_tpus_has_the_other_gelu():
    def program(platform: str, dtype) -> str:
        return jax.jit(gelu).trace(jnp.zeros(4, dtype)).lower(lowering_platforms=(platform,)).as_text()

    uses_erf = {
        (platform, dtype): "erf" in program(platform, dtype)
        for platform in ("tpu", "cpu", "cuda")
        for dtype in ("bfloat16", "float32")
    }
    assert {of for of, erf in uses_erf.items() if not erf} == {("tpu", "bfloat16")}
