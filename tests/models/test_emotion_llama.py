"""What is trained, and what the settings of the whole model do."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from emollama_jax.config import Config, load_config
from emollama_jax.data.batch import Batch, soft_tokens_per_clip
from emollama_jax.models.emotion_llama import (
    TRAINABLE,
    EmotionLlama,
    insert_soft_tokens,
    is_trainable,
    num_image_tokens,
)
from emollama_jax.models.projectors import PROJECTORS, ProjectorsConfig
from emollama_jax.sharding import abstract
from emollama_jax.train.step import init_state, make_step, multimodal_loss
from emollama_jax.weights.engine import param_values
from tests.models.tiny import initialised
from tests.weights.exported import trained_tensors

TINY = load_config("tiny")
TRAINED = {
    "lora": [f"llama.layers.attn.{target}.lora_{letter}" for target in ("q_proj", "v_proj") for letter in "ab"],
    **{name: [f"projectors.{name}.kernel", f"projectors.{name}.bias"] for name in PROJECTORS},
}
GOLDEN = """\
llama_model.base_model.model.model.layers.{0,1,2}.self_attn.{q,v}_proj.lora_{A,B}.weight
llama_proj.{weight,bias}
feats_llama_proj{1,2,3}.{weight,bias}
cls_tk_llama_proj.{weight,bias}"""


def make_model(config: Config = TINY, **kwargs) -> EmotionLlama:
    parts = (config.llama, config.lora, config.projectors, config.eva_vit)
    return initialised(EmotionLlama.init, *parts, seed=config.seed, **kwargs)


def batch_of(config: Config = TINY) -> Batch:
    """Two rows of one clip: text, its soft tokens, text, and an answer of three tokens."""
    rng = np.random.default_rng(0)
    soft = soft_tokens_per_clip(config)
    index = np.concatenate([[-1] * 3, np.arange(soft), [-1] * 6])
    length = len(index)
    columns = {
        "tokens": rng.integers(3, 640, (2, length)),
        "soft_index": np.tile(index, (2, 1)),
        "segment_ids": np.ones((2, length)),
        "positions": np.tile(np.arange(length), (2, 1)),
    }
    is_target = (np.arange(length) >= length - 4) & (np.arange(length) < length - 1)
    width = config.eva_vit.hidden_size
    return Batch(
        **{name: jnp.asarray(value, jnp.int32) for name, value in columns.items()},
        loss_weights=jnp.asarray(np.tile(is_target, (2, 1)), jnp.float32),
        image_tokens=jnp.asarray(rng.normal(size=(2, 1, 1 + config.eva_vit.grid**2, width)), jnp.float32),
        features=jnp.asarray(rng.normal(size=(2, 1, 3, config.projectors.feature_size)), jnp.float32),
    )


@nnx.jit
def hidden_of(model: EmotionLlama, batch: Batch) -> jax.Array:
    soft = model.soft_tokens(batch.features, image_tokens=batch.image_tokens)
    return model(batch.tokens, soft, batch.soft_index, batch.positions, batch.segment_ids)


@nnx.jit
def soft_tokens(model: EmotionLlama, batch: Batch, has_image: np.ndarray | None = None) -> jax.Array:
    return model.soft_tokens(batch.features, image_tokens=batch.image_tokens, has_image=has_image)


@nnx.jit
def loss_of(model: EmotionLlama, batch: Batch) -> jax.Array:
    return multimodal_loss(model, batch, None)[0]


def paths(tree) -> set[str]:
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(tree)}


def expanded(pattern: str) -> set[str]:
    """The names that a pattern with {a,b} stands for."""
    match = re.search(r"{([^}]*)}", pattern)
    if not match:
        return {pattern}
    return set().union(*(expanded(pattern.replace(match[0], choice, 1)) for choice in match[1].split(",")))


@pytest.mark.slow
def test_gradients_optimiser_and_checkpoint_hold_exactly_what_is_trained():
    model = make_model()
    names = set().union(*map(set, TRAINED.values()))
    optimizer = optax.adamw(1e-3)
    graphdef, frozen, state = init_state(model, optimizer)
    assert paths(state.trainable) == names
    assert paths(frozen) == paths(nnx.state(model)) - names
    assert paths(state.opt_state[0].mu) == paths(state.opt_state[0].nu) == names
    grads = jax.grad(lambda t: multimodal_loss(nnx.merge(graphdef, t, frozen), batch_of(), None)[0])(state.trainable)
    assert paths(grads) == names
    at_start = {path: np.abs(value).max() for path, value in param_values(grads).items()}
    assert {path for path, largest in at_start.items() if largest == 0} == {p for p in names if p.endswith("lora_a")}
    assert set(trained_tensors(model)) == set().union(*map(expanded, GOLDEN.split("\n")))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.trainable))


def test_a_clip_whose_image_is_not_seen_has_zeros_for_its_tokens():
    model, batch = make_model(), batch_of()
    seen = np.array([[True], [False]])
    ours = np.asarray(soft_tokens(model, batch, seen))
    blank = dataclasses.replace(batch, image_tokens=batch.image_tokens * seen[:, :, None, None])
    np.testing.assert_array_equal(ours, soft_tokens(model, blank))
    assert (ours[1] != soft_tokens(model, batch)[1]).any()


@pytest.mark.parametrize("part", TRAINABLE)
def test_each_part_alone(part):
    model = make_model()
    assert paths(nnx.state(model, functools.partial(is_trainable, parts=(part,)))) == set(TRAINED[part])
    graphdef, frozen, state = init_state(model, optax.sgd(1.0), (part,))
    before = {path: np.array(value) for path, value in param_values(nnx.state(model)).items()}
    step = make_step(graphdef, optax.sgd(1.0), multimodal_loss)
    for _ in range(2):  # the first moves LoRA's B, and only then A has a gradient
        state, _ = step(state, frozen, batch_of())
    after = param_values(nnx.state(nnx.merge(graphdef, state.trainable, frozen)))
    assert {path for path in before if not np.array_equal(before[path], after[path])} == set(TRAINED[part])


@pytest.mark.smoke
def test_training_lowers_the_loss():
    optimizer = optax.adamw(1e-2)
    graphdef, frozen, state = init_state(make_model(with_encoder=False), optimizer)
    step = make_step(graphdef, optimizer, multimodal_loss)
    losses = []
    for _ in range(8):
        state, metrics = step(state, frozen, batch_of(), jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.2  # the frozen head is small: it cannot fall far
    assert metrics["targets"] == 6


def test_bfloat16_stays_near_float32():
    half = dataclasses.replace(TINY, llama=dataclasses.replace(TINY.llama, compute_dtype="bfloat16"))
    losses = [float(loss_of(make_model(config), batch_of())) for config in (TINY, half)]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], abs=0.05)


def test_the_loss_of_a_clip_depends_on_nothing_beside_it():
    model, batch = make_model(), batch_of()
    mixed = dataclasses.replace(
        batch,
        tokens=batch.tokens.at[1].set(batch.tokens[1][::-1]),
        image_tokens=batch.image_tokens.at[1].multiply(-3),
        features=batch.features.at[1].multiply(-3),
    )
    hidden = [hidden_of(model, one)[0] for one in (batch, mixed)]
    np.testing.assert_allclose(hidden[0], hidden[1], rtol=0, atol=1e-5)


def test_soft_tokens_are_placed_by_their_index():
    x, soft = jnp.zeros((2, 4, 3)), jnp.arange(2 * 5 * 3, dtype=jnp.float32).reshape(2, 5, 3)
    placed = insert_soft_tokens(x, soft, jnp.array([[-1, 4, 0, -1], [3, -1, 3, 2]], jnp.int32))
    expected = np.zeros((2, 4, 3))
    expected[0, 1], expected[0, 2] = soft[0, 4], soft[0, 0]
    expected[1, 0] = expected[1, 2] = soft[1, 3]
    expected[1, 3] = soft[1, 2]
    np.testing.assert_array_equal(placed, expected)


def test_image_tokens_group_consecutive_patches():
    model = make_model()
    image = np.random.default_rng(0).normal(size=(1, 17, 48)).astype(np.float32)
    features = jnp.zeros((1, 3, 1024))
    before = np.asarray(model.projectors(jnp.asarray(image), features))
    image[0, 1 + 6] += 1  # the seventh patch: of the second token
    changed = np.abs(np.asarray(model.projectors(jnp.asarray(image), features)) - before).max(-1)[0] > 1e-6
    assert np.flatnonzero(changed).tolist() == [1]
    image[0, 0] += 1  # the class token, the last
    changed = np.abs(np.asarray(model.projectors(jnp.asarray(image), features)) - before).max(-1)[0] > 1e-6
    assert np.flatnonzero(changed).tolist() == [1, 7]


@pytest.mark.parametrize(("name", "value"), [("patches_per_token", 2), ("feature_size", 768)])
def test_every_field_has_an_effect(name, value):
    assert {field.name for field in dataclasses.fields(ProjectorsConfig)} == {"patches_per_token", "feature_size"}
    changed = dataclasses.replace(TINY, projectors=dataclasses.replace(TINY.projectors, **{name: value}))
    shapes = lambda config: jax.tree.map(jnp.shape, abstract(lambda: make_model(config))[1])
    assert shapes(changed) != shapes(TINY)


def test_full_size():
    config = Config()
    _, state = abstract(lambda: make_model(config))
    count = lambda which: sum(x.size for x in jax.tree.leaves(nnx.filter_state(state, which)))
    assert count(is_trainable) == 74_993_664
    assert num_image_tokens(config.eva_vit, config.projectors) == 256


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ProjectorsConfig(patches_per_token=0), "patches_per_token=0: must be at least 1"),
        (lambda: ProjectorsConfig(feature_size=0), "feature_size=0: must be at least 1"),
        (
            lambda: Config(projectors=ProjectorsConfig(patches_per_token=3)),
            "projectors.patches_per_token=3: must divide the image's 1024 patches",
        ),
        (lambda: Config(trainable=("llama",)), "trainable=('llama',): no 'llama'; choose among lora, image_proj"),
    ],
    ids=["group", "feature", "divide", "part"],
)
def test_values_refused(make, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        make()
