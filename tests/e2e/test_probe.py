"""Each path from a video to a feature carries its own signal and no other: what a linear probe of features from
encoders that have learnt nothing tells of synthetic clips."""

import dataclasses

import numpy as np
import pytest

from emollama_jax.config import load_config
from emollama_jax.data.annotations import Annotations, Clip
from emollama_jax.data.prepare import prepare
from emollama_jax.data.records import Records
from emollama_jax.features.encoders import random_encoders
from emollama_jax.features.extract import extraction_part_maker, extraction_recipe
from emollama_jax.synthetic.dataset import make_dataset
from emollama_jax.synthetic.words import UNCLEAR
from emollama_jax.text.labels import MERR

pytest.importorskip("av")

CLIPS = 198
FOLDS = 6
CHANCE = 1 / 3  # a factor has three levels
DEVIATION = (CHANCE * (1 - CHANCE) / (0.9 * CLIPS)) ** 0.5  # of a guess; a tenth of the clips is unclear in something
RIDGE = 3.0


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """(features [N, 3, D], factors by name) of synthetic clips.

    The encoders see whole pictures as one patch: in one layer of random numbers, little else is left of where
    something is.
    """
    folder = tmp_path_factory.mktemp("probe")
    made = make_dataset(folder / "clips", clips={"train": CLIPS}, workers=1)
    tiny, small = load_config("tiny"), {"num_layers": 1, "hidden_size": 256, "intermediate_size": 512}
    picture = {"image_size": 32, "patch_size": 32}
    config = dataclasses.replace(
        tiny,
        mae=dataclasses.replace(tiny.mae, **small, **picture),
        videomae=dataclasses.replace(tiny.videomae, **small, **picture, num_frames=16, tubelet_size=16),
        hubert=dataclasses.replace(tiny.hubert, **small, conv_norm="group", feature_norm=False),
        projectors=dataclasses.replace(tiny.projectors, feature_size=256),
        clip=dataclasses.replace(tiny.clip, max_faces=6),
    )
    clips = tuple(Clip(name=spec.name, split="train", video=made.video(spec)) for spec in made.clips)
    encoders = random_encoders(config)
    recipe = extraction_recipe(config, encoders, labels=MERR, frame_rule="middle")
    prepared = prepare(
        "clips", Annotations(clips, ()), folder / "data", recipe, extraction_part_maker(config, encoders, workers=1)
    )
    records = Records(prepared.path, "train")
    features = np.stack([records[i]["features"] for i in range(len(records))])
    return features, {name: [getattr(spec.factors, name) for spec in made.clips] for name in ("face", "voice", "words")}


def accuracy(features, levels) -> float:
    """Of a ridge regression to the levels of a factor, cross-validated over the clips in which it is clear."""
    levels = np.array(levels)
    clear = levels != UNCLEAR
    x, levels = features[clear].astype(np.float64), levels[clear]
    names = sorted(set(levels))
    truth = np.array([names.index(level) for level in levels])
    right = 0
    for fold in range(FOLDS):
        test = np.arange(len(x)) % FOLDS == fold
        mean, deviation = x[~test].mean(axis=0), x[~test].std(axis=0) + 1e-9
        train, held_out = ((x[part] - mean) / deviation for part in (~test, test))
        wanted = np.eye(len(names))[truth[~test]] - 1 / len(names)
        penalty = RIDGE * len(train) * np.eye(x.shape[1])
        weights = np.linalg.solve(train.T @ train + penalty, train.T @ wanted)
        right += int(((held_out @ weights).argmax(axis=1) == truth[test]).sum())
    return right / len(x)


@pytest.mark.slow
@pytest.mark.parametrize(("column", "sees", "least"), [(0, "face", 0.6), (1, "face", 0.45), (2, "voice", 0.8)])
def test_a_path_carries_its_signal_and_no_other(probed, column, sees, least):
    features, factors = probed
    found = {name: accuracy(features[:, column], levels) for name, levels in factors.items()}
    name = ("MAE", "VideoMAE", "HuBERT")[column]
    print(f"{name}: " + ", ".join(f"{factor} {value:.2f}" for factor, value in found.items()))
    assert found[sees] > least > CHANCE + 3 * DEVIATION
    assert all(abs(value - CHANCE) < 3 * DEVIATION for factor, value in found.items() if factor != sees)
