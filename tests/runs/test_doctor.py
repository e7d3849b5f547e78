"""`emollama doctor`: every byte of a run and of its language model is read and compared."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from emollama_jax import cli
from emollama_jax.config import load_config, to_dict
from emollama_jax.io.file_list import write_file_list
from emollama_jax.runs.checkpoints import Checkpoints
from emollama_jax.runs.run import Run
from emollama_jax.weights.base_checkpoint import read_manifest, save_base
from emollama_jax.weights.pretrained import load_llama
from tests.train.runs import write_meta
from tests.weights.older_base import as_older_base
from tests.weights.tiny import random_weights, tiny_config, write_folder


@pytest.fixture
def run(tmp_path):
    """A run of two checkpoints, with values that it does not train, on the base checkpoint `base`."""
    config = tiny_config(num_layers=1)
    (tmp_path / "base").mkdir()
    model, _ = load_llama(write_folder(tmp_path / "hf", config, random_weights(config)))
    fingerprint = save_base(tmp_path / "base", model, source="tiny")
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        fixed = checkpoints.save_fixed({"attention.x": np.arange(3.0)})
    experiment = to_dict(load_config("tiny"))
    experiment["weights"]["base"] = str(tmp_path / "base")
    for step in ("1", "2"):
        write_meta(tmp_path / "run/checkpoints" / step, config=experiment, fixed=fixed, base=fingerprint)
    return tmp_path / "run"


def flip(file: Path) -> None:
    """Changes a bit as a disk does: without a new time, as far as that can be had."""
    data, found = bytearray(file.read_bytes()), file.stat()
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


def test_a_sound_run_and_each_damage(run, capsys):
    base, checkpoints = run.parent / "base", run / "checkpoints"
    folders = [checkpoints / "1", checkpoints / "2", run / "fixed", base]
    assert cli.main(["doctor", str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{folder}: sound" for folder in folders]
    largest = lambda folder: max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    for folder in folders:
        flip(largest(folder))
        for path in {run, folder if folder.name != "fixed" else run}:
            assert cli.main(["doctor", str(path)]) == 1
            (wrong,) = [line for line in capsys.readouterr().out.splitlines() if not line.endswith(": sound")]
            assert wrong.startswith(f"{folder}: ") and "damaged" in wrong
        flip(largest(folder))
    assert cli.main(["doctor", str(run), str(base)]) == 0


def test_another_language_model_than_the_run_names(run, capsys):
    file = run.parent / "base/model.json"
    as_older_base(file.parent, 1)
    old = {name: value for name, value in read_manifest(file.parent).items() if name != "llama"}
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | old | {"fingerprint": "sha256:other"}))
    assert cli.main(["doctor", str(file.parent)]) == 1  # an older one, by the fingerprint of its parameters
    assert "its parameters are not what was written" in capsys.readouterr().out
    file.write_text(json.dumps(content))
    assert cli.main(["doctor", str(run)]) == 0
    meta = Run.open(run).meta | {"base": "sha256:other"}
    for step in ("1", "2"):
        write_meta(run / "checkpoints" / step, **meta)
    assert cli.main(["doctor", str(run)]) == 1
    assert "another language model than" in capsys.readouterr().out
    assert cli.main(["doctor", str(run.parent / "hf")]) == 2
    assert "no run, checkpoint, base checkpoint or fetched folder" in capsys.readouterr().err


def test_a_folder_that_was_fetched(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    write_file_list(tmp_path)
    assert cli.main(["doctor", str(tmp_path)]) == 0
    (tmp_path / "config.json").write_text("[]")
    assert cli.main(["doctor", str(tmp_path)]) == 1
    assert "damaged (config.json is not what was written)" in capsys.readouterr().out
