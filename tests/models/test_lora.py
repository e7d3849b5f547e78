"""Adapters by themselves: scale, dropout, merging, and what is trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax.models import lora as lora_module
from emollama_jax.models.layers import as_array
from emollama_jax.models.llama import Llama
from emollama_jax.models.lora import PROJECTIONS, LoRAConfig, LoRALinear, adapters, is_adapter, merge, merged_kernel
from emollama_jax.weights.engine import param_values
from tests.models.tiny import close, random_llama, rows, tiny_config


def linear(lora: LoRAConfig, features: int) -> LoRALinear:
    """y = dropout(x) * alpha / r: no kernel, and the identity for A and B."""
    layer = LoRALinear(
        features, features, axes=("embed", "embed"), lora=lora, kernel_dtype="float32", init_std=0.0, rngs=nnx.Rngs(0)
    )
    layer.lora_a[...] = layer.lora_b[...] = jnp.eye(features)
    return layer


@nnx.jit
def hidden_of(model, args, dropout_key=None):
    tokens, positions, segment_ids = args
    return model(model.embed_tokens(tokens), positions, segment_ids, dropout_key=dropout_key)


@pytest.mark.parametrize(("rank", "alpha", "scale"), [(8, 16.0, 2.0), (64, 16.0, 0.25), (5, 12.0, 2.4)])
def test_the_scale_is_alpha_over_rank(rank, alpha, scale):
    layer = linear(LoRAConfig(rank=rank, alpha=alpha), rank)
    x = jax.random.normal(jax.random.key(0), (3, rank))
    np.testing.assert_allclose(layer(x), scale * x, rtol=1e-6)


def test_a_new_adapter_changes_nothing():
    """B starts at zero, and A as PEFT's: uniform with a variance of 1 / (3 in)."""
    config = tiny_config(hidden_size=64)
    model = nnx.jit(lambda: Llama(config, LoRAConfig(rank=32), rngs=nnx.Rngs(0)))()
    values = param_values(nnx.state(model, is_adapter))
    assert not any(np.any(value) for name, value in values.items() if name.endswith("lora_b"))
    args = rows(config)
    with_adapters = hidden_of(model, args)
    for _, layer in adapters(model):
        layer.merged = True
    np.testing.assert_array_equal(with_adapters, hidden_of(model, args))
    a = np.asarray(values["layers.attn.q_proj.lora_a"])
    assert np.max(np.abs(a)) <= 64**-0.5
    assert np.var(a) == pytest.approx(1 / (3 * 64), rel=0.05)
    assert len(np.unique(a.reshape(a.shape[0], -1), axis=0)) == config.num_layers


@pytest.mark.smoke
def test_dropout_is_off_without_a_key():
    lora = LoRAConfig(rank=4, dropout=0.5)
    model, args = random_llama(tiny_config(), lora), rows(tiny_config())
    without = random_llama(tiny_config(), dataclasses.replace(lora, dropout=0.0))
    whole = hidden_of(model, args)
    np.testing.assert_array_equal(whole, hidden_of(without, args, jax.random.key(0)))

    dropped = hidden_of(model, args, jax.random.key(0))
    assert np.max(np.abs(dropped - whole)) > 0.01
    np.testing.assert_array_equal(dropped, hidden_of(model, args, jax.random.key(0)))
    assert np.max(np.abs(dropped - hidden_of(model, args, jax.random.key(1)))) > 0.01


def test_dropout_drops_its_share_and_keeps_the_mean():
    p, count = 0.3, 40_000
    layer = linear(LoRAConfig(rank=8, alpha=16.0, dropout=p), 8)
    y = np.asarray(layer(jnp.ones((count, 8)), jax.random.key(0))) / 2.0
    is_kept = y != 0
    np.testing.assert_allclose(y[is_kept], 1 / (1 - p), rtol=1e-6)
    five_sigma = 5 * np.sqrt(p * (1 - p) / y.size)
    assert abs(np.mean(is_kept) - (1 - p)) < five_sigma
    assert abs(np.mean(y) - 1) < five_sigma / (1 - p)
    by_feature = 5 * np.sqrt(p * (1 - p) / count)
    np.testing.assert_allclose(np.mean(is_kept, 0), 1 - p, atol=by_feature)
    assert np.var(np.mean(is_kept, 1)) == pytest.approx(p * (1 - p) / 8, rel=0.05)  # each element on its own


def test_dropout_differs_between_layers_and_targets(monkeypatch):
    """Each adapter of each layer draws its own mask; scanned layers draw those of unrolled ones."""
    lora = LoRAConfig(rank=4, alpha=4.0, dropout=0.5, targets=PROJECTIONS)
    (tokens, positions, segment_ids), key = rows(tiny_config()), jax.random.key(7)
    graphdef, params = nnx.split(random_llama(tiny_config(scan_layers=False), lora))
    draw = lora_module.kept

    @jax.jit
    def run(params):
        masks = []
        spy = lambda *args, **kwargs: masks.append(draw(*args, **kwargs)) or masks[-1]
        with monkeypatch.context() as patch:
            patch.setattr(lora_module, "kept", spy)
            model = nnx.merge(graphdef, params)
            return model(model.embed_tokens(tokens), positions, segment_ids, dropout_key=key), masks

    unrolled, masks = jax.device_get(run(params))
    assert len(masks) == 2 * len(PROJECTIONS)
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            width = min(mask.shape[-1], other.shape[-1])
            agreement = np.mean(mask[..., :width] == other[..., :width])
            assert abs(agreement - 0.5) < 5 * 0.5 / np.sqrt(mask[..., :width].size)
    scanned = hidden_of(random_llama(tiny_config(), lora), (tokens, positions, segment_ids), key)
    close(scanned, unrolled, 1e-4, "scanned and unrolled")


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_quantised_kernels_are_not_merged_into(dtype):
    """Neither are the others of the model; `merged_kernel` has the sum in float32."""
    model = random_llama(tiny_config(kernel_dtype=dtype), LoRAConfig(rank=4))
    with pytest.raises(ValueError, match="cannot be merged into int8/nf4 kernels"):
        merge(model)
    assert not any(layer.merged for _, layer in adapters(model))
    layer = model.layers.attn.q_proj
    kernel = merged_kernel(layer)
    assert kernel.dtype == jnp.float32
    expected = as_array(layer.kernel.get_value()) + layer.scale * np.matmul(layer.lora_a[...], layer.lora_b[...])
    np.testing.assert_allclose(kernel, expected, atol=1e-6)


def test_merging_keeps_the_dtype_and_is_up_to_its_rounding():
    model = random_llama(tiny_config(kernel_dtype="bfloat16"), LoRAConfig(rank=4))
    layer = model.layers.attn.q_proj
    expected = merged_kernel(layer).astype(jnp.bfloat16)
    merge(model)
    assert layer.kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(layer.kernel[...], expected)
    np.testing.assert_array_equal(merged_kernel(layer), expected.astype(jnp.float32))


def test_only_adapters_are_trained():
    model = random_llama(tiny_config(), LoRAConfig(rank=4, targets=("q_proj", "down_proj")))
    trained = set(param_values(nnx.state(model, is_adapter)))
    assert trained == {f"layers.{name}.lora_{letter}" for name in ("attn.q_proj", "mlp.down_proj") for letter in "ab"}
    assert not param_values(nnx.state(random_llama(tiny_config()), is_adapter))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": -1}, "rank=-1: "),
        ({"dropout": 1.0}, "dropout=1.0: "),
        ({"dropout": -0.1}, "dropout=-0.1: "),
        ({"targets": ("q_proj", "query")}, "no 'query'; choose among q_proj, k_proj"),
    ],
)
def test_values_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        LoRAConfig(**changes)
