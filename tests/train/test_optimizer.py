import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from emollama_jax.config import TrainConfig
from emollama_jax.models.layers import param
from emollama_jax.train.optimizer import learning_rate, make_optimizer, set_means


def test_the_schedule_is_the_references():
    """The defaults: 1e-6 to 1e-5 in 1,000 steps, then the cosine of all 30,000 to 1e-6."""
    config = TrainConfig()
    rate = lambda step: float(learning_rate(config, step))
    assert rate(0) == pytest.approx(1e-6)
    assert rate(500) == pytest.approx(5.5e-6)
    assert rate(999) == pytest.approx(1e-6 + 9e-6 * 0.999)
    for step in (1000, 15_000, 29_999):
        assert rate(step) == pytest.approx(1e-6 + 9e-6 * 0.5 * (1 + math.cos(math.pi * step / 30_000)))
    assert rate(30_000) == rate(40_000) == pytest.approx(1e-6)
    on_device = jax.jit(lambda step: learning_rate(config, step))
    for step in (0, 999, 1000, 20_000):
        assert float(on_device(step)) == pytest.approx(rate(step), rel=1e-5)


@pytest.mark.smoke
def test_matrices_decay_and_vectors_do_not():
    """With no gradient the only change is the decay, by rate times 0.05."""
    optimizer = make_optimizer(TrainConfig(warmup_steps=0, learning_rate=0.1, steps=10))
    matrices = {name: param(jnp.ones((2, 2)), (None, None)) for name in ("kernel", "lora_a", "lora_b")}
    vectors = {name: param(jnp.ones(2), (None,)) for name in ("bias", "scale")}
    params = nnx.State({"layer": {**matrices, **vectors}})
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    found = {path[-1]: variable.get_value() for path, variable in nnx.to_flat_state(updates)}
    for name in (*matrices, *vectors):
        np.testing.assert_allclose(found[name], -0.1 * 0.05 if name in matrices else 0, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_clipping_is_by_the_norm_of_all_gradients(clip_norm):
    """AdamW's first mean is a tenth of the gradient that it was given."""
    config = TrainConfig(clip_norm=clip_norm)
    optimizer = make_optimizer(config)
    params = {"a": {"kernel": jnp.zeros((2, 2))}, "b": {"bias": jnp.zeros(2)}}
    grads = {"a": {"kernel": jnp.full((2, 2), 3.0)}, "b": {"bias": jnp.full(2, 4.0)}}
    _, state = optimizer.update(grads, optimizer.init(params), params)
    mean = optax.tree.get(state, "mu")
    norm = math.sqrt(4 * 9 + 2 * 16)
    assert float(optax.tree.norm(mean)) == pytest.approx(0.1 * (clip_norm or norm), rel=1e-5)
    assert float(mean["b"]["bias"][0] / mean["a"]["kernel"][0, 0]) == pytest.approx(4 / 3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"warmup_steps": 30_000}, r"warmup_steps=30000: must be below train\.steps=30000"),
        ({"beta1": 1.0}, r"beta1=1\.0"),
        ({"beta2": -0.1}, r"beta2=-0\.1"),
        ({"epsilon": 0.0}, r"epsilon=0\.0"),
        ({"clip_norm": -1.0}, r"clip_norm=-1\.0: must be at least 0"),
        ({"learning_rate": math.nan}, r"learning_rate=nan"),
        ({"keep": 1}, r"keep=1: must be at least 2"),
        ({"non_finite": "ignore"}, r"non_finite='ignore': choose one of stop, skip"),
        ({"validation": ("data/dfew/frame/1.0.0:test",)}, "is a test split"),
        ({"validation": ("a:dev", "data/mer:test1")}, "data/mer:test1 is a test split"),
        ({"profile": (3,)}, r"profile=\(3,\): give the first and the last step"),
        ({"profile": (5, 4)}, r"profile=\(5, 4\)"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_centred_projectors_are_those_of_centred_inputs():
    """The steps of x W + b, centred, are those of (x - m) W + c, with Adam, clipping and decay."""
    config = TrainConfig(learning_rate=0.05, warmup_steps=0, steps=20, clip_norm=1.0, center_projectors=True)
    rng = np.random.default_rng(0)
    x, y = (5 + rng.normal(size=(12, 6))).astype(np.float32), rng.normal(size=(12, 3)).astype(np.float32)
    mean, kernel = x.mean(0), rng.normal(size=(6, 3)).astype(np.float32)

    def train(optimizer, inputs, bias, means=None):
        params = {"projectors": {"mae_proj": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}}
        loss = lambda p: jnp.mean((inputs @ p["kernel"] + p["bias"] - y) ** 2)
        state = optimizer.init(params)
        if means is not None:
            state = set_means(state, means)
        for _ in range(10):
            gradients = jax.grad(lambda p: loss(p["projectors"]["mae_proj"]))(params)
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params["projectors"]["mae_proj"]

    plain = make_optimizer(dataclasses.replace(config, center_projectors=False))
    ours = train(make_optimizer(config), x, np.zeros(3, np.float32), {"mae_proj": mean})
    theirs = train(plain, x - mean, mean @ kernel)
    np.testing.assert_allclose(ours["kernel"], theirs["kernel"], atol=2e-5)
    np.testing.assert_allclose(ours["bias"], theirs["bias"] - mean @ theirs["kernel"], atol=2e-4)
    uncentred = train(make_optimizer(config), x, np.zeros(3, np.float32))
    np.testing.assert_allclose(uncentred["kernel"], train(plain, x, np.zeros(3, np.float32))["kernel"], atol=1e-6)
    assert abs(uncentred["kernel"] - ours["kernel"]).max() > 0.1


def test_means_are_of_the_projectors_that_are_trained_alone():
    params = {"llama": {"lora_a": jnp.ones((4, 2))}, "projectors": {"cls_proj": {"kernel": jnp.ones((4, 2))}}}
    params["projectors"]["cls_proj"]["bias"] = jnp.ones(2)
    state = make_optimizer(TrainConfig(center_projectors=True)).init(params)
    assert {name: mean.tolist() for name, mean in state.means.items()} == {"cls_proj": [0.0] * 4}
    state = set_means(state, {"cls_proj": np.arange(4.0), "mae_proj": np.ones(3)})
    assert {name: mean.tolist() for name, mean in state.means.items()} == {"cls_proj": [0.0, 1.0, 2.0, 3.0]}
