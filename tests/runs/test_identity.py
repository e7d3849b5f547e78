"""What a run says of its data, and what of it must be the same when it goes on or another begins with its weights."""

import json
from pathlib import Path

import pytest

from emollama_jax.config import load_config, parse_flags
from emollama_jax.data.datasets import open_datasets
from emollama_jax.errors import UserError
from emollama_jax.runs.identity import check_same, describe_run
from emollama_jax.runs.run import Run
from tests.data.prepared import write_data
from tests.train.runs import write_meta

BASE = {"format": 1, "llama": {}, "fingerprint": "base", "source": ""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base checkpoint's manifest, and image tokens by two frame rules."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "base").mkdir()
    (folder / "base/model.json").write_text(json.dumps(BASE))
    for frame in ("peak", "first"):
        recipe = {"image": "image_tokens", "frame_rule": frame, "encoders": {"mae": "m", "eva_vit": "one"}}
        write_data(folder / f"{frame}-data", {"train": 2}, **recipe).rename(folder / frame)
    return folder


def identity(folder: Path, *frames: str) -> dict:
    config, _ = parse_flags([f"--config.weights.base={folder}/base"], load_config("tiny"))
    return describe_run(config, open_datasets([f"{folder}/{frame}:train" for frame in frames], config, "data.train"), 1)


def test_it_holds_the_frame_rules_and_all_encoders(folder):
    found = identity(folder, "peak", "first")
    assert found["frame_rules"] == ["first", "peak"] and identity(folder, "peak")["frame_rules"] == ["peak"]
    assert found["encoders"] == {"mae": "m", "eva_vit": "one"}
    assert json.loads(json.dumps(found))["frame_rules"] == found["frame_rules"]


def test_a_run_that_does_not_know_its_frame_rules_goes_on(folder):
    now = identity(folder, "peak")
    old = {name: value for name, value in now.items() if name != "frame_rules"}
    for saved in (old, old | {"frame_rules": None}, old | {"frame_rules": ["first"]}):
        check_same(saved, now, "run")
    with pytest.raises(UserError, match="data.train: not what this run was begun with"):
        check_same(old | {"data": [["train", 3, None]]}, now, "run")


def test_a_run_older_than_the_average_of_the_loss_goes_on_by_token(folder):
    now = identity(folder, "peak")
    train = {name: value for name, value in now["config"]["train"].items() if name != "loss_average"}
    old = now | {"config": now["config"] | {"train": train}}
    with pytest.raises(UserError, match="config.train.loss_average was 'token' in this run and is 'clip' now"):
        check_same(old, now, "run")
    by_token = now["config"] | {"train": train | {"loss_average": "token"}}
    check_same(old, now | {"config": by_token}, "run")


@pytest.mark.parametrize(("known", "refused"), [({"eva_vit": "two"}, True), ({"eva_vit": "one"}, False), ({}, False)])
def test_image_tokens_of_another_encoder_do_not_go_on_with_its_weights(folder, tmp_path, known, refused):
    write_meta(tmp_path, encoders={"hubert": "h"} | known)
    if not refused:
        return Run.open(tmp_path).check_encoders(identity(folder, "peak")["encoders"])
    with pytest.raises(UserError, match="was trained on eva_vit features of two, and here they are of one; give"):
        Run.open(tmp_path).check_encoders(identity(folder, "peak")["encoders"])
