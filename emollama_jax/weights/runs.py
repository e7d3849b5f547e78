"""A training run's folder, as far as others read it: which checkpoints it has, and the trained weights in one.

    config.json                     the experiment
    metrics.jsonl, events.out...    what was measured
    fixed/                          adapters and projectors that the run does not train, and `attention.*` (Orbax)
    checkpoints/STEP/state/         arrays by name: trainable.PATH, opt_state.PATH and step (Orbax)
    checkpoints/STEP/meta/          the experiment, what it was trained on, and the best validation so far
    checkpoints/STEP/data/          where each process was in the data
    checkpoints/STEP/files.json     size and SHA-256 of each of these files, written last
    damaged_STEP/                   a checkpoint that could not be used, put aside

A folder may be a path or gs://BUCKET/FOLDER. A checkpoint without `files.json` was not finished; one whose files are
not those is damaged. Neither is ever read.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from emollama_jax.errors import UserError
from emollama_jax.io.checksums import file_digest
from emollama_jax.io.paths import as_path

CHECKPOINTS, FIXED, CONFIG = "checkpoints", "fixed", "config.json"
STATE, META, DATA = "state", "meta", "data"
FILES = "files.json"
TRAINABLE = "trainable."  # before the paths of parameters among the names of a state


@dataclass(frozen=True)
class RunWeights:
    """What a checkpoint says of the weights: values by the parameter's path, tensors that the model does not have under
    their own names, and `meta`."""

    values: dict[str, np.ndarray]
    carried: dict[str, np.ndarray]
    meta: dict[str, Any]


def is_run(path: epath.PathLike) -> bool:
    """Whether this is a run's folder or one of its checkpoints."""
    return any((as_path(path) / name).is_dir() for name in (CHECKPOINTS, STATE))


def checkpoint_of(path: epath.PathLike) -> epath.Path:
    """The folder of a run's newest sound checkpoint, or of the checkpoint that `path` is.

    Raises:
        UserError: there is none, or the one named is damaged.
    """
    path = as_path(path)
    if (path / STATE).is_dir():
        if problem := damage(path):
            raise UserError(f"{problem}: {path}; name another checkpoint of the run")
        return path
    sound = [step for step in steps_of(path) if not damage(path / CHECKPOINTS / str(step))]
    if not sound:
        raise UserError(f"no sound checkpoint: {path}; train on, or give another run")
    return path / CHECKPOINTS / str(sound[-1])


def read_run(path: epath.PathLike) -> RunWeights:
    """The trained weights in `checkpoint_of(path)`."""
    folder = checkpoint_of(path)
    meta = read_meta(folder)
    values = {name.removeprefix(TRAINABLE): value for name, value in read_arrays(folder / STATE, TRAINABLE).items()}
    fixed_folder = folder.parent.parent / FIXED
    fixed = read_arrays(fixed_folder) if fixed_folder.is_dir() else {}
    carried = {name: value for name, value in fixed.items() if name in meta["carried"]}
    values |= {name: value for name, value in fixed.items() if name not in carried}
    return RunWeights(values, carried, meta)


def read_meta(folder: epath.PathLike) -> dict[str, Any]:
    """What a checkpoint says of itself beside its arrays."""
    return json.loads((epath.Path(folder) / META / "metadata").read_text())


def read_arrays(folder: epath.PathLike, prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of an Orbax folder whose names begin with `prefix`, on the host."""
    handler, folder = ocp.PyTreeCheckpointHandler(), as_path(folder)
    with ocp.Checkpointer(handler) as checkpointer:
        names = [name for name in handler.metadata(folder).tree if name.startswith(prefix)]
        wanted = dict.fromkeys(names, 0)
        how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
        return checkpointer.restore(folder, args=arguments)


def steps_of(run: epath.PathLike) -> list[int]:
    """The steps of a run's checkpoints, sound or not, in order."""
    folder = as_path(run) / CHECKPOINTS
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal()) if folder.is_dir() else []


def write_file_list(folder: epath.Path) -> None:
    """Seals a finished checkpoint: writes `files.json`."""
    text = json.dumps({name: _fingerprint(folder / name) for name in _files(folder)}, indent=1, sort_keys=True)
    (folder / FILES).write_text(text)


def damage(folder: epath.PathLike) -> str | None:
    """What is wrong with a checkpoint, in words; None if nothing is."""
    folder = epath.Path(folder)
    if not (folder / FILES).exists():
        return f"not finished (no {FILES})"
    try:
        expected = json.loads((folder / FILES).read_text())
    except ValueError:
        return f"damaged ({FILES} is cut short)"
    if missing := sorted(set(expected) - set(_files(folder))):
        return f"damaged (no {missing[0]})"
    changed = [name for name, known in expected.items() if _fingerprint(folder / name) != known]
    return f"damaged ({changed[0]} is not what was written)" if changed else None


def _files(folder: epath.Path, below: str = "") -> list[str]:
    """The paths of all files of a checkpoint but `files.json`."""
    found = []
    for path in (folder / below).iterdir():
        name = f"{below}{path.name}"
        if path.is_dir():
            found += _files(folder, f"{name}/")
        elif name != FILES:
            found.append(name)
    return found


def _fingerprint(path: epath.Path) -> list:
    """[bytes, SHA-256] of a file."""
    return [path.stat().length, file_digest(path)]
