"""Checkpoints as folders: sealed, damaged in every way, put aside, kept and let go."""

import json
import os
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from flax import nnx

from emollama_jax.errors import UserError
from emollama_jax.io.file_list import find_damage
from emollama_jax.models.layers import param
from emollama_jax.runs.checkpoint_files import find_steps, read_data_state
from emollama_jax.runs.checkpoints import Checkpoints, named_arrays
from emollama_jax.train.step import TrainState

META = {"carried": [], "adapter_name": "", "best": {}}


def state_of(seed: int) -> TrainState:
    values = np.random.default_rng(seed).normal(size=(2, 6, 4)).astype(np.float32)
    trainable = nnx.State({"layer": {"lora_a": param(jnp.asarray(values), ("layers", "embed", None))}})
    opt_state = optax.adamw(1e-3).init(trainable)
    return TrainState(trainable, jax.tree.map(lambda x: x + seed, opt_state), jnp.int32(seed))


def iterator_at(number: int) -> grain.DatasetIterator:
    iterator = iter(grain.MapDataset.range(100).to_iter_dataset())
    for _ in range(number):
        next(iterator)
    return iterator


def write(folder, *steps: int, keep: int = 3, best: int | None = None) -> None:
    with Checkpoints(epath.Path(folder), keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), iterator_at(step), META | {"step": step}, best=best)


def same(one: TrainState, other: TrainState) -> bool:
    ours, theirs = named_arrays(one), named_arrays(other)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.smoke
def test_what_is_saved_is_restored(tmp_path):
    write(tmp_path, 3, 5)
    with Checkpoints(epath.Path(tmp_path), keep=2) as checkpoints:
        assert checkpoints.newest == 5
        assert checkpoints.open_newest().meta == META | {"step": 5, "encoders": {}}
        iterator = iterator_at(0)
        assert same(checkpoints.restore(5, state_of(0), iterator), state_of(5))
        assert next(iterator) == 5
    assert set(named_arrays(state_of(1))) == {
        "trainable.layer.lora_a",
        "opt_state.0.count",
        "opt_state.0.mu.layer.lora_a",
        "opt_state.0.nu.layer.lora_a",
        "step",
    }


def test_an_empty_folder_has_none(tmp_path):
    with Checkpoints(epath.Path(tmp_path / "new"), keep=2) as checkpoints:
        assert checkpoints.newest is None


def test_the_newest_and_the_best_are_kept(tmp_path):
    write(tmp_path, 1, 2, 3, 4, 5, keep=2, best=2)
    assert find_steps(tmp_path) == [2, 4, 5]


DAMAGES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "one bit changed": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
}


@pytest.mark.slow
def test_damage_to_any_file_is_seen_and_the_one_before_is_taken(tmp_path):
    whole = tmp_path / "whole"
    write(whole, 3, 5)
    newest = whole / "checkpoints/5"
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    assert len(files) >= 10
    for name in files:
        for how, spoil in DAMAGES.items():
            if not (newest / name).stat().st_size:
                continue
            run = tmp_path / "run"
            shutil.copytree(whole, run)
            spoil(run / "checkpoints/5" / name)
            said = []
            with Checkpoints(epath.Path(run), keep=2, log=said.append) as checkpoints:
                assert checkpoints.newest == 3, (name, how)
            (message,) = said
            assert "checkpoint of step 5 is " in message and "put aside" in message
            assert str(name) in message, (how, message)
            assert (run / "damaged_5").is_dir() and find_steps(run) == [3]
            shutil.rmtree(run)


def test_after_damage_the_run_goes_on_and_makes_the_step_again(tmp_path):
    write(tmp_path, 3, 5)
    (tmp_path / "checkpoints/5/files.json").unlink()
    said = []
    with Checkpoints(epath.Path(tmp_path), keep=2, log=said.append) as checkpoints:
        iterator = iterator_at(0)
        assert same(checkpoints.restore(3, state_of(0), iterator), state_of(3))
        assert next(iterator) == 3
        checkpoints.save(5, state_of(5), iterator_at(5), META)
    assert "checkpoint of step 5 is not finished" in said[0]
    assert find_damage(tmp_path / "checkpoints/5") is None
    assert find_steps(tmp_path) == [3, 5]


def test_a_folder_that_orbax_had_not_finished_is_no_checkpoint(tmp_path):
    write(tmp_path, 3)
    half = tmp_path / "checkpoints/5.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints/3", half)
    with Checkpoints(epath.Path(tmp_path), keep=2) as checkpoints:
        assert checkpoints.newest == 3


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    with Checkpoints(tmp_path, keep=2):
        with pytest.raises(
            UserError, match=rf"another process \({os.getpid()} on .*\) trains in this folder: .*wait for"
        ):
            Checkpoints(tmp_path, keep=2)
    (tmp_path / "fixed.orbax-checkpoint-tmp-1").mkdir()  # of a run that was killed as it began
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path, keep=2):
        raise ZeroDivisionError
    with Checkpoints(tmp_path, keep=2):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "checkpoints"}


def test_where_the_run_was_in_the_data_is_read_by_any_number_of_processes(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for process, parts in enumerate(({"0": "a", "1": "b"}, {"1": "b", "2": "c"})):
        (folder / f"process_{process}-of-2.json").write_text(json.dumps({"parts": parts}))
    assert read_data_state(tmp_path) == {"parts": {"0": "a", "1": "b", "2": "c"}}


def test_older_runs_keep_one_state_a_process(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "process_0-of-2.json").write_text('{"parent": 1}')
    assert read_data_state(tmp_path) == {"parent": 1}  # all read the same
    (folder / "process_1-of-2.json").write_text('{"parent": 2}')
    with pytest.raises(UserError, match="begun by 2 processes with an older version"):
        read_data_state(tmp_path)
    (folder / "process_0-of-1.json").write_text('{"parent": 3}')
    assert read_data_state(tmp_path) == {"parent": 3}
