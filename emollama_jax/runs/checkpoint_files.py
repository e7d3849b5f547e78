"""The layout of a run's folder, and whether the files of a checkpoint are what was written.

    config.json                       the experiment
    metrics.jsonl, events.out...      what was measured
    fixed/                            adapters and projectors that the run does not train, and `attention.*` (Orbax)
    checkpoints/STEP/params/          the trained parameters by name, trainable.PATH (Orbax)
    checkpoints/STEP/opt_state/       the optimiser's arrays by name, opt_state.PATH, and step (Orbax)
    checkpoints/STEP/meta/            the experiment, what it was trained on, and the best validation so far
    checkpoints/STEP/data/            where each process was in the data
    checkpoints/STEP/files.json       size and SHA-256 of each of these files, written last
    damaged_STEP/                     a checkpoint that could not be used, put aside

A folder may be a path or gs://BUCKET/FOLDER. A checkpoint without `files.json` is not finished. One whose files are of
other sizes is damaged; so is one with another SHA-256, which is compared of the files that are to be read. Older
checkpoints have `state/` in place of `params/` and `opt_state/`.
"""

import json
from collections.abc import Collection
from typing import Any

import numpy as np
from etils import epath

from emollama_jax.io.checksums import file_digest
from emollama_jax.io.orbax_arrays import read_arrays
from emollama_jax.io.paths import as_path

CHECKPOINTS, FIXED, CONFIG = "checkpoints", "fixed", "config.json"
PARAMS, OPT_STATE, META, DATA = "params", "opt_state", "meta", "data"
STATE = "state"  # of older checkpoints
FILES = "files.json"
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


def write_file_list(folder: epath.PathLike) -> None:
    """Seals a finished checkpoint: writes `files.json`."""
    folder = as_path(folder)
    found = {name: [(folder / name).stat().length, file_digest(folder / name)] for name in _list_files(folder)}
    (folder / FILES).write_text(json.dumps(found, indent=1, sort_keys=True))


def find_damage(folder: epath.PathLike, parts: Collection[str] | None = None) -> str | None:
    """Says in words what is wrong with a checkpoint; None if nothing is.

    Args:
        parts: the subfolders whose files are read and compared; of all others the sizes are. Default: every file.
    """
    folder = as_path(folder)
    try:
        expected = json.loads((folder / FILES).read_text())
    except FileNotFoundError:
        return f"not finished (no {FILES})"
    except ValueError:
        return f"damaged ({FILES} is cut short)"
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.exists():
            return f"damaged (no {name})"
        is_read = parts is None or name.partition("/")[0] in parts
        if file.stat().length != size or (is_read and file_digest(file) != digest):
            return f"damaged ({name} is not what was written)"
    return None


def _list_files(folder: epath.Path, below: str = "") -> list[str]:
    """Lists the paths of all files of a checkpoint but `files.json`."""
    found = []
    for path in (folder / below).iterdir():
        name = f"{below}{path.name}"
        if path.is_dir():
            found += _list_files(folder, f"{name}/")
        elif name != FILES:
            found.append(name)
    return found
