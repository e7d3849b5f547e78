"""`emollama baseline`: each feature at what it can know, all together at what they know together."""

import json

import numpy as np
import pytest

from emollama_jax import cli
from emollama_jax.data.recipe import Recipe
from emollama_jax.data.records import open_split
from emollama_jax.errors import UserError
from emollama_jax.eval.baseline import HeadSettings, _averaged, choose_inputs, fit_head, read_inputs
from emollama_jax.text.labels import MERR
from tests.data.prepared import random_record, write_data

TRAIN, TEST, WIDTH = 270, 90, 64
SPOKEN = ("they say so", "it is over now", "tomorrow perhaps")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Nine labels: the voice leaves three of them, the words three others, both together one. The image says nothing;
    the voice's encoder has outputs that differ by a tenth of what they all share."""
    rng, records = np.random.default_rng(0), []
    recipe = Recipe(labels=MERR, image_storage="image_tokens", image_tokens_shape=(17, 8), feature_size=WIDTH)
    shared, voices = 10 * rng.normal(size=WIDTH), rng.normal(size=(3, WIDTH))
    for i in range(TRAIN + TEST):
        emotion = int(rng.integers(9))
        has = np.array([False, False, i != 3])
        features = np.zeros((3, WIDTH), np.float32)
        features[2] = (shared + voices[emotion // 3] + rng.normal(size=WIDTH)) * has[2]
        changes = {"features": features, "subtitle": SPOKEN[emotion % 3], "emotion": emotion if i != TRAIN else -1}
        record = random_record(i, rng, recipe, has_feature=has, **changes)
        record["image_tokens"] = rng.normal(size=(17, 8)).astype(np.float16)
        records.append(record)
    splits, folder = {"train": records[:TRAIN], "test": records[TRAIN:]}, tmp_path_factory.mktemp("data")
    shape = {"image": "image_tokens", "image_tokens_shape": (17, 8), "feature_size": WIDTH}
    return {
        split: f"{write_data(folder / split, {split: len(some)}, records=some, **shape)}:{split}"
        for split, some in splits.items()
    }


def run(*argv: object) -> int:
    return cli.main(["baseline", *map(str, argv)])


def test_features_alone_and_together(data, tmp_path, capsys):
    argv = ["labels", "--train", data["train"], "--data", data["test"], "--seeds", 2, "--steps", 100]
    argv += ["--head", "linear"]
    assert run(*argv, "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out/baseline.json").read_text())
    rows = {row["inputs"]: row for row in found["rows"]}
    assert list(rows) == ["hubert", "words", "frame", "all"]  # no clip has a face or a motion
    assert rows["all"]["clips"] == TEST - 1
    accuracy = {name: np.mean(row["scores"]["accuracy"]) for name, row in rows.items()}
    for name in ("hubert", "words"):
        assert accuracy[name] == pytest.approx(1 / 3, abs=0.12), name
        assert np.mean(rows[name]["label_loss"]) == pytest.approx(np.log(3), abs=0.2), name
    assert accuracy["frame"] < 0.25 and accuracy["all"] > 0.9
    page, told = (tmp_path / "out/baseline.md").read_text(), capsys.readouterr().out
    assert "| **emollama_jax**, all: hubert, words, frame | " in page and "floor: always" in page and " ± " in page
    assert "all " in told and "floor, always" in told


@pytest.mark.smoke
def test_a_head_is_a_function_of_its_seed(data):
    train = open_split(data["train"])
    inputs = read_inputs(train)
    numbers = np.array(train.metadata["answers"]["train"]["emotion"], np.int32)
    fit = lambda seed: fit_head(
        inputs, MERR, numbers, names=("words", "frame"), settings=HeadSettings(head="linear", steps=30, seed=seed)
    )
    kernel = lambda head: np.asarray(head.params["layers"][0]["kernel"])
    one = fit(1)
    np.testing.assert_array_equal(kernel(one), kernel(fit(1)))
    assert np.abs(kernel(one) - kernel(fit(2))).max() > 0
    assert len(one.params["layers"]) == 1 and np.abs(one.params["queries"]["frame"]).max() > 0
    with pytest.raises(UserError, match="3 labelled clips to train on; give 5 or more"):
        fit_head({"words": inputs["words"][:3]}, MERR, numbers[:3], names=("words",))


def test_views_of_several_features_are_tried():
    there, none = np.ones((2, 1, 4), np.float32), np.zeros((2, 1, 4), np.float32)
    found = choose_inputs({"mae": there, "videomae": none, "hubert": there, "words": there, "frame": there})
    assert list(found) == ["mae", "hubert", "words", "frame", "V", "all"]
    assert found["V"] == ("mae", "frame") and found["all"] == ("mae", "hubert", "words", "frame")


def test_image_tokens_are_averaged_over_a_grid():
    tokens = np.concatenate([np.full((1, 2), 7.0), np.arange(64.0).repeat(2).reshape(64, 2)])
    found = _averaged(tokens.astype(np.float32))
    assert found.shape == (17, 2) and found[0, 0] == 7
    assert found[1, 0] == np.mean([0, 1, 8, 9]) and found[2, 1] == np.mean([2, 3, 10, 11])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["mer2023", "--train", "none:train", "--data", "none:test"], "no prepared data set: none"),
        (["labels", "--train", "TRAIN", "--data", "TRAIN"], "are the same clips"),
        (["mer2023", "--train", "TRAIN", "--data", "TEST"], "has clips with the label"),
        (["labels", "--train", "folder", "--data", "TEST"], "write FOLDER:SPLIT"),
    ],
)
def test_what_cannot_be_done_is_one_line(argv, message, data, tmp_path, capsys):
    assert run(*(data.get(word.lower(), word) if word.isupper() else word for word in argv), "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
