"""New projectors that begin from the training data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from emollama_jax.config import Config
from emollama_jax.data.datasets import open_datasets
from emollama_jax.data.recipe import Recipe
from emollama_jax.models.emotion_llama import EmotionLlama
from emollama_jax.models.projectors import PROJECTORS
from emollama_jax.sharding import make_mesh
from emollama_jax.train import projector_inputs
from emollama_jax.train.projector_inputs import projector_moments, standardize_projectors
from tests.data.prepared import random_record, tiny_config, write_data

SHAPE = (17, 48)
CLIPS = 40


@pytest.fixture(scope="module")
def records():
    """Clips whose features are one large vector and small differences; some lack a feature, and hold numbers there."""
    recipe = Recipe(labels=("sad",), image_storage="image_tokens", size=56, image_tokens_shape=SHAPE)
    rng = np.random.default_rng(5)
    common = 10 * rng.normal(size=(3, 1024))
    made = []
    for number in range(CLIPS):
        features = common + 0.1 * rng.normal(size=common.shape)
        has_feature = np.array([True, number % 4 > 0, True])
        features[~has_feature] = 1e6
        tokens = 5 + rng.normal(size=SHAPE)
        changes = {"features": features.astype(np.float32), "has_feature": has_feature}
        made.append(random_record(number, rng, recipe, **changes, image_tokens=tokens.astype(np.float16)))
    return made


@pytest.fixture(scope="module")
def config(records, tmp_path_factory) -> Config:
    data = write_data(tmp_path_factory.mktemp("data"), {"train": CLIPS}, image="image_tokens", records=records)
    return tiny_config({"train": (f"{data}:train",)})


def make_model(config: Config, *, with_encoder: bool = False) -> EmotionLlama:
    groups = (config.llama, config.lora, config.projectors, config.eva_vit)
    return EmotionLlama.init(*groups, with_encoder=with_encoder, rngs=nnx.Rngs(0))


def standardized(config: Config) -> EmotionLlama:
    model = make_model(config)
    standardize_projectors(model, projector_moments(model, open_datasets(config.data.train, config, "data.train")))
    return model


def soft_tokens(model: EmotionLlama, records) -> np.ndarray:
    """[N, S, D]."""
    image = jnp.asarray(np.stack([record["image_tokens"] for record in records]), jnp.float32)
    return np.asarray(model.projectors(image, jnp.asarray(np.stack([record["features"] for record in records]))))


def test_soft_tokens_have_the_mean_0_and_the_size_of_embeddings(config, records):
    model = standardized(config)
    soft = soft_tokens(model, records)
    size = float(jnp.sqrt(jnp.mean(jnp.square(model.llama.embed.embedding[...]))))
    seen = np.stack([record["has_feature"] for record in records])
    kinds = {"image": soft[:, :-4], "cls": soft[:, -1:]}
    kinds |= {str(index): soft[seen[:, index], -4 + index] for index in range(3)}
    for name, tokens in kinds.items():
        tokens = tokens.reshape(-1, tokens.shape[-1])
        assert abs(tokens.mean(0)).max() < 0.01 * size, name
        assert np.sqrt(np.square(tokens).mean()) == pytest.approx(size, rel=0.15), name
    before = soft_tokens(make_model(config), records)
    assert abs(before[:, -4].mean(0)).max() > 50 * before[:, -4].std(0).max()


def test_they_are_the_same_on_a_mesh(config, records):
    model, mesh = make_model(config), make_mesh({"data": 4, "fsdp": 2})
    for name in PROJECTORS:
        projector = getattr(model.projectors, name)
        split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
        projector.kernel[...] = jax.device_put(projector.kernel[...], split)
        projector.bias[...] = jax.device_put(projector.bias[...], NamedSharding(mesh, PartitionSpec("fsdp")))
    standardize_projectors(model, projector_moments(model, open_datasets(config.data.train, config, "data.train")))
    expected = standardized(config)
    for name in PROJECTORS:
        ours, theirs = getattr(model.projectors, name), getattr(expected.projectors, name)
        assert ours.kernel[...].sharding.spec == PartitionSpec(None, "fsdp")
        np.testing.assert_allclose(ours.kernel[...], theirs.kernel[...], rtol=1e-6)
        np.testing.assert_allclose(ours.bias[...], theirs.bias[...], rtol=1e-5, atol=1e-6)


def test_inputs_that_are_alike_or_missing_leave_a_projector_as_it_was(config, records, tmp_path):
    absent = np.array([False, True, True])
    alike = [record | {"has_feature": absent, "image_tokens": records[0]["image_tokens"]} for record in records]
    data = write_data(tmp_path, {"train": CLIPS}, image="image_tokens", records=alike)
    model, before = make_model(config), make_model(config)
    datasets = open_datasets((f"{data}:train",), config, "data.train")
    standardize_projectors(model, projector_moments(model, datasets))
    same = lambda name: np.array_equal(*(getattr(m.projectors, name).kernel[...] for m in (model, before)))
    assert [name for name in PROJECTORS if same(name)] == ["mae_proj", "cls_proj"]


def test_clips_are_spread_over_all_data_sets(config, records, tmp_path, monkeypatch):
    data = write_data(tmp_path, {"train": 30, "more": 10}, image="image_tokens")
    datasets = open_datasets((f"{data}:train", f"{data}:more"), config, "data.train")
    numbers = lambda: [record["number"] for record in projector_inputs._spread(datasets)]
    assert numbers() == list(range(40))
    monkeypatch.setattr(projector_inputs, "CLIPS", 4)
    assert numbers() == [0, 13, 26, 39]


def test_frames_are_encoded(config, tmp_path):
    data = write_data(tmp_path, {"train": 6})
    model = make_model(config, with_encoder=True)
    (dataset,) = datasets = open_datasets((f"{data}:train",), config, "data.train")
    standardize_projectors(model, projector_moments(model, datasets))
    frames = jnp.stack([jnp.full((56, 56, 3), number, jnp.uint8) for number in range(len(dataset))])
    soft = model.projectors(model.eva_vit.encode(frames), jnp.zeros((6, 3, 1024)))
    tokens = np.asarray(soft[:, -1])
    assert abs(tokens.mean(0)).max() < 0.01 * abs(tokens).max()
