import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from emollama_jax.config import DEFAULT_SHARDING, load_config
from emollama_jax.data.batch import Batch, batch_spec
from emollama_jax.models.emotion_llama import EmotionLlama
from emollama_jax.models.llama import Llama
from emollama_jax.models.lora import LoRAConfig, is_adapter
from emollama_jax.sharding import init_sharded, make_mesh, use_mesh
from emollama_jax.train.optimizer import make_optimizer
from emollama_jax.train.step import init_state, make_step, multimodal_loss, text_loss
from tests.models.tiny import initialised

TINY = load_config("tiny").llama
LORA = LoRAConfig(rank=4, targets=("q_proj", "v_proj"))
VOCAB = TINY.vocab_size


def make_model(lora: LoRAConfig = LORA, **changes) -> Llama:
    return initialised(Llama, dataclasses.replace(TINY, **changes), lora)


def row(*samples: np.ndarray, length: int) -> Batch:
    """One packed row; a sample's second half is its answer, whose tokens weigh 1 each."""
    integers = ("tokens", "segment_ids", "positions")
    batch = Batch(
        **{name: np.zeros((1, length), np.int32) for name in integers},
        soft_index=np.full((1, length), -1, np.int32),
        loss_weights=np.zeros((1, length), np.float32),
    )
    start = 0
    for segment, sample in enumerate(samples, 1):
        here, half = slice(start, start + len(sample)), start + len(sample) // 2
        batch.tokens[0, here] = sample
        batch.segment_ids[0, here] = segment
        batch.positions[0, here] = np.arange(len(sample))
        batch.loss_weights[0, half - 1 : here.stop - 1] = 1
        start = here.stop
    return batch


def rows(*batches: Batch) -> Batch:
    return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)


def samples(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, length) for length in lengths]


@pytest.fixture(scope="module")
def batch() -> Batch:
    a, b, c, d, e = samples(7, 5, 12, 9, 16)
    return rows(row(a, b, length=16), row(c, length=16), row(d, length=16), row(e, length=16))


def on_host(tree):
    return jax.tree.map(np.array, jax.tree.leaves(tree))  # copies: the step takes its state's memory


def test_the_optimiser_knows_the_adapters_and_nothing_else():
    model = make_model()
    graphdef, frozen, state = init_state(model, optax.adamw(1e-3))
    adapters = {f"layers.attn.{name}.lora_{letter}" for name in LORA.targets for letter in "ab"}
    paths = lambda tree: {".".join(map(str, path)) for path, _ in nnx.to_flat_state(tree)}
    assert paths(state.trainable) == adapters
    assert paths(frozen) == paths(nnx.state(model)) - adapters
    moments = state.opt_state[0]
    for moment in (moments.mu, moments.nu):
        assert paths(moment) == adapters
        assert jax.tree.map(jnp.shape, moment) == jax.tree.map(jnp.shape, state.trainable)
    assert len(jax.tree.leaves(state.opt_state)) == 2 * len(adapters) + 1  # and Adam's count of steps


@pytest.mark.parametrize("kernel_dtype", ["float32", "int8"])
def test_training_lowers_the_loss_and_leaves_the_frozen_weights_alone(batch, kernel_dtype):
    optimizer = optax.adamw(2e-2)
    model = make_model(
        LoRAConfig(rank=16, alpha=32.0, targets=("q_proj", "v_proj", "up_proj")), kernel_dtype=kernel_dtype
    )
    graphdef, frozen, state = init_state(model, optimizer)
    before, start = on_host(frozen), on_host(state.trainable)
    step = make_step(graphdef, optimizer, text_loss)
    losses = []
    for _ in range(30):
        state, metrics = step(state, frozen, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(VOCAB), rel=0.05)
    assert losses[-1] < losses[0] - 0.5
    assert int(state.step) == 30
    assert int(metrics["targets"]) == (batch.loss_weights > 0).sum()
    assert float(metrics["grad_norm"]) > 0
    for old, new in zip(before, on_host(frozen), strict=True):
        assert old.tobytes() == new.tobytes()
    assert all((old != new).any() for old, new in zip(start, on_host(state.trainable), strict=True))


@pytest.mark.slow
def test_eight_devices_take_the_same_step_as_one(batch):
    optimizer = optax.adamw(1e-2)

    def train(model, steps=2):
        graphdef, frozen, state = init_state(model, optimizer)
        places = jax.tree.map(lambda x: x.sharding, state.trainable)
        step = make_step(graphdef, optimizer, text_loss)
        for _ in range(steps):
            state, metrics = step(state, frozen, batch, jax.random.key(3))
        assert jax.tree.map(lambda x: x.sharding, state.trainable) == places
        assert step._cache_size() == 1, "the state of the second step is placed as the first's"
        return on_host((state, metrics))

    alone = train(make_model())
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with use_mesh(mesh, DEFAULT_SHARDING):
        model = init_sharded(make_model, mesh, DEFAULT_SHARDING)
        assert not model.layers.attn.q_proj.lora_b[...].sharding.is_fully_replicated
        together = train(model)
    for one, many in zip(alone, together, strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-5)


@pytest.mark.smoke
def test_packed_and_separate_rows_have_the_same_loss_and_gradient():
    a, b, c = samples(7, 5, 12)
    packed = row(a, b, c, length=32)
    separate = rows(*(row(sample, length=16) for sample in (a, b, c)))
    optimizer = optax.sgd(1.0)
    results = []
    for batch in (packed, separate):
        graphdef, frozen, state = init_state(make_model(), optimizer)
        state, metrics = make_step(graphdef, optimizer, text_loss)(state, frozen, batch)
        results.append(on_host((state.trainable, metrics)))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


def test_a_batch_without_targets_changes_nothing(batch):
    optimizer = optax.sgd(1.0)
    graphdef, frozen, state = init_state(make_model(), optimizer)
    before = on_host(state.trainable)
    empty = dataclasses.replace(batch, loss_weights=np.zeros_like(batch.loss_weights))
    state, metrics = make_step(graphdef, optimizer, text_loss)(state, frozen, empty)
    assert {name: float(value) for name, value in metrics.items()} == {"loss": 0, "grad_norm": 0, "targets": 0}
    for old, new in zip(before, on_host(state.trainable), strict=True):
        np.testing.assert_array_equal(old, new)


def test_dropout_differs_from_step_to_step_and_is_repeatable(batch):
    """A learning rate of 0 leaves only the dropout to change the loss."""
    optimizer = optax.sgd(0.0)
    losses = []
    for _ in range(2):
        model = make_model(LoRAConfig(rank=4, dropout=0.5))
        flat = nnx.state(model, is_adapter)
        nnx.update(model, jax.tree.map(lambda x: x + 0.3, flat))  # B is zero at first, which hides the dropout
        graphdef, frozen, state = init_state(model, optimizer)
        step = make_step(graphdef, optimizer, text_loss)
        for _ in range(2):
            state, metrics = step(state, frozen, batch, jax.random.key(7))
            losses.append(float(metrics["loss"]))
        _, metrics = step(state, frozen, batch)
        assert float(metrics["loss"]) not in losses
    assert losses[:2] == losses[2:]
    assert losses[0] != losses[1]


def test_a_batch_in_parts_has_the_gradient_of_the_whole(batch):
    """The rows have different numbers of clips and targets, so the parts do not weigh the same, neither by clip
    nor by token."""
    shares = np.maximum((batch.loss_weights > 0).sum(axis=1, keepdims=True), 1) / [[2], [1], [1], [1]]
    by_clip = dataclasses.replace(batch, loss_weights=(batch.loss_weights / shares).astype(np.float32))
    optimizer, results = optax.sgd(1.0), []
    mesh = make_mesh({"data": 2, "fsdp": 1, "tensor": 1}, jax.devices()[:2])
    with use_mesh(mesh, DEFAULT_SHARDING):
        graphdef, frozen, state = init_state(init_sharded(make_model, mesh, DEFAULT_SHARDING), optimizer)
        for grad_accum_steps in (1, 2):
            step, found = make_step(graphdef, optimizer, text_loss, grad_accum_steps=grad_accum_steps), []
            for weighted in (by_clip, batch):
                after, metrics = step(jax.tree.map(jnp.copy, state), frozen, weighted)  # the step takes its memory
                found += on_host((after.trainable, metrics))
            results.append(found)
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


def test_training_is_in_float32_where_float64_is_the_default_of_jax():
    """Of the whole model, in parts, with dropout; scalars, as optax has, may be float64 on their way."""
    config = load_config("tiny")
    optimizer = make_optimizer(config.train)
    parts = (config.llama, config.lora, config.projectors, config.eva_vit)
    with jax.enable_x64(True):
        make = lambda: init_state(EmotionLlama.init(*parts, rngs=nnx.Rngs(0)), optimizer)
        graphdef, frozen, state = jax.eval_shape(make)
        step = make_step(graphdef, optimizer, multimodal_loss, grad_accum_steps=2)
        batch = batch_spec(config, images="frames", rows=2)
        program, result = jax.make_jaxpr(step, return_shape=True)(state, frozen, batch, jax.random.key(0))
    assert not re.findall(r"f64\[\d.*", str(program))
    assert jax.tree.map(lambda x: x.dtype, result[0]) == jax.tree.map(lambda x: x.dtype, state)
    dtypes = {x.dtype for x in jax.tree.leaves((frozen, result)) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert dtypes == {jnp.dtype("float32")}


def test_a_step_that_is_not_finite_counts_and_changes_nothing(batch):
    optimizer = optax.adamw(1e-2)
    model = make_model()
    graphdef, frozen, state = init_state(model, optimizer)
    frozen.final_norm.scale.set_value(frozen.final_norm.scale.get_value() * np.nan)
    before = on_host((state.trainable, state.opt_state))
    state, metrics = make_step(graphdef, optimizer, text_loss)(state, frozen, batch)
    assert np.isnan(metrics["loss"]) and np.isnan(metrics["grad_norm"])
    assert int(state.step) == 1
    for old, new in zip(before, on_host((state.trainable, state.opt_state)), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_scale_of_the_loss_keeps_small_gradients_of_float16_and_changes_nothing_else(batch):
    """The gradients of a hundred thousand targets' mean are below the smallest numbers of float16."""
    many = 2.0**17
    model = lambda dtype: make_model(compute_dtype=dtype)
    tiny = lambda model, batch, key: tuple(
        x * f for x, f in zip(text_loss(model, batch, key), (1 / many, 1), strict=True)
    )

    def gradient(dtype: str, scale: float) -> np.ndarray:
        optimizer = optax.sgd(many)
        graphdef, frozen, state = init_state(model(dtype), optimizer)
        before = on_host(state.trainable)
        after, metrics = make_step(graphdef, optimizer, tiny, loss_scale=scale)(state, frozen, batch)
        assert float(metrics["loss"]) == pytest.approx(np.log(VOCAB) / many, rel=0.05)
        steps = [old - new for old, new in zip(before, on_host(after.trainable), strict=True)]
        norm = np.sqrt(sum((x**2).sum() for x in steps))
        assert float(metrics["grad_norm"]) * many == pytest.approx(norm, rel=1e-2)
        return np.concatenate([step.ravel() for step in steps])

    exact = gradient("float32", 1.0)
    assert np.array_equal(gradient("float32", 2.0**15), exact)
    error = lambda scale: np.linalg.norm(gradient("float16", scale) - exact) / np.linalg.norm(exact)
    assert error(2.0**15) < 0.02 < 0.2 < error(1.0)
