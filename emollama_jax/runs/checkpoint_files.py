"""The layout of a run's folder, and whether the files of a checkpoint are what was written.

    config.json                       the experiment
    metrics.jsonl, events.out...      what was measured
    fixed/                            adapters and projectors that the run does not train, and `attention.*` (Orbax)
    fixed/files.json                  size and SHA-256 of its files; its own SHA-256 is in `meta`
    checkpoints/STEP/params/          the trained parameters by name, trainable.PATH (Orbax)
    checkpoints/STEP/opt_state/       the optimiser's arrays by name, opt_state.PATH, and step (Orbax)
    checkpoints/STEP/meta/            the experiment, what it was trained on, and the best validation so far
    checkpoints/STEP/data/            where each process was in the data
    checkpoints/STEP/files.json       size and SHA-256 of each of these files, written last
    damaged_STEP/                     a checkpoint that could not be used, put aside
    .lock                             is locked while a process trains in the folder, and says which one

A folder may be a path or gs://BUCKET/FOLDER. A checkpoint without `files.json` is not finished. One whose files are of
other sizes is damaged; so is one with another SHA-256, which is compared of the files that are read. Older
checkpoints have `state/` in place of `params/` and `opt_state/`.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from emollama_jax.data.batch_shards import PARTS
from emollama_jax.errors import UserError
from emollama_jax.io.checksums import file_digest
from emollama_jax.io.file_list import FILES, find_damage
from emollama_jax.io.orbax_arrays import read_arrays
from emollama_jax.io.paths import as_path

CHECKPOINTS, FIXED, CONFIG, LOCK = "checkpoints", "fixed", "config.json", ".lock"
PARAMS, OPT_STATE, META, DATA = "params", "opt_state", "meta", "data"
STATE = "state"  # of older checkpoints
TRAINABLE = "trainable."  # before the paths of parameters among the names of arrays


def is_checkpoint(path: epath.Path) -> bool:
    """Returns whether the folder is a run's checkpoint, sound or not."""
    return (path / META).is_dir()


def find_steps(run: epath.PathLike) -> list[int]:
    """Lists the steps of a run's checkpoints, sound or not, in order."""
    folder = as_path(run) / CHECKPOINTS
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal()) if folder.is_dir() else []


def has_old_layout(folder: epath.Path) -> bool:
    """Returns whether a checkpoint keeps all arrays together, in `state/`."""
    return not (folder / PARAMS).is_dir() and (folder / STATE).is_dir()


def read_params(folder: epath.PathLike) -> dict[str, np.ndarray]:
    """Reads a checkpoint's trained parameters by path, on the host."""
    folder = as_path(folder)
    arrays = read_arrays(
        folder / (STATE if has_old_layout(folder) else PARAMS), lambda name: name.startswith(TRAINABLE)
    )
    return {name.removeprefix(TRAINABLE): value for name, value in arrays.items()}


def read_meta(folder: epath.PathLike) -> dict[str, Any]:
    """Reads what a checkpoint says of itself beside its arrays."""
    return json.loads((as_path(folder) / META / "metadata").read_text())


def read_data_state(folder: epath.PathLike) -> dict[str, Any]:
    """Reads where the run was in the data: the states of all parts of its batches, whichever process wrote them.

    Raises:
        UserError: the run is older than these, and it had another number of processes.
    """
    folder = as_path(folder) / DATA
    states = {path.name: json.loads(path.read_text()) for path in folder.glob("process_*.json")}
    if all(PARTS in state for state in states.values()):
        return {PARTS: {part: one for state in states.values() for part, one in state[PARTS].items()}}
    mine = f"process_{jax.process_index()}-of-{jax.process_count()}.json"
    if mine not in states and len(states) > 1:
        raise UserError(f"the run was begun by {len(states)} processes with an older version: {folder}; start as many")
    return states.get(mine) or next(iter(states.values()))


def fixed_digest(run: epath.PathLike) -> str:
    """Returns what tells the fixed values of a run from others; "" where it has none."""
    file = as_path(run) / FIXED / FILES
    return file_digest(file) if file.exists() else ""


def check_fixed(run: epath.PathLike, digest: str | None, *, anew: bool = False) -> bool:
    """Returns whether a checkpoint has fixed values, in its run's folder.

    Args:
        digest: the `fixed_digest` that the checkpoint was written with; None for older ones, which cannot be checked.
        anew: as of `find_damage`.

    Raises:
        UserError: the values are missing, damaged, or those of another run.
    """
    folder = as_path(run) / FIXED
    if digest is None:
        return folder.is_dir()
    if digest == "":
        return False
    problem = f"damaged (no {FIXED})" if not folder.is_dir() else find_damage(folder, anew=anew)
    if not problem and fixed_digest(run) != digest:
        problem = "another run's"
    if problem:
        raise UserError(f"what the run does not train is {problem}: {folder}; copy it again, or train the run again")
    return True


def read_fixed(run: epath.PathLike, digest: str | None, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """Reads the fixed values with the names that are `wanted`, on the host; see `check_fixed`."""
    return read_arrays(as_path(run) / FIXED, wanted) if check_fixed(run, digest) else {}
