"""Where weights are: at a path on this machine, at an address in a bucket, or, by name, on the Hugging Face hub.

    ORG/NAME, ORG/NAME@REVISION     a model of the hub, unless there is such a path or a folder ORG here
    hf://ORG/NAME[@REVISION]        the same, whatever is here
    hf://ORG/NAME/FILE[@REVISION]   one file of it

Models of the hub come into its cache (HF_HOME), which other programs share, and stay there.
"""

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath

from etils import epath

from emollama_jax.errors import UserError
from emollama_jax.io.hub import cached_files
from emollama_jax.io.paths import PathLike, as_path, is_remote

SCHEME = "hf://"
NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<file>[^@]+))?(?:@(?P<revision>[\w./-]+))?")
OURS = ("weights", "runs", "data", "configs")  # folders that our own defaults name; they may not be there yet
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".msgpack", ".gguf")  # one kind is taken, in this order
BESIDE = (".json", ".model", ".txt", ".jinja")  # settings and tokenizers
NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|consolidated).*")


def locate(path: PathLike) -> epath.Path:
    """Returns the path of weights; those of the hub are downloaded where they are not in its cache.

    Raises:
        UserError: there is no such model, its files are damaged, or the hub does not give them (`io/hub.py`).
    """
    name = _hub_name(os.fspath(path))
    return epath.Path(_download(**name)) if name else as_path(path)


def is_hub_name(path: PathLike) -> bool:
    """Returns whether a path names a model of the hub; nothing is asked of it."""
    return _hub_name(os.fspath(path)) is not None


def _hub_name(path: str) -> dict[str, str | None] | None:
    if path.startswith(SCHEME):
        if match := NAME.fullmatch(path.removeprefix(SCHEME)):
            return match.groupdict()
        raise UserError(f"no name of a model on the hub: {path}; write hf://ORG/NAME or hf://ORG/NAME@REVISION")
    match = None if is_remote(path) else NAME.fullmatch(path)
    if match is None or match["file"] or os.path.lexists(path):
        return None
    folder = path.partition("/")[0]
    return None if folder in OURS or os.path.isdir(folder) else match.groupdict()


@functools.lru_cache
def _download(repo: str, file: str | None, revision: str | None) -> Path:
    """The folder of a model in the cache, or the one file."""
    choose = (lambda names: [name for name in names if name == file]) if file else choose_files
    try:
        folder = cached_files(repo, revision or "main", choose)
    except UserError as error:
        raise UserError(f"{error} ({repo} is no folder here, so it was taken for a model of the hub)") from error
    return folder / file if file else folder


def choose_files(names: Sequence[str]) -> list[str]:
    """Chooses among the files of a model: the weights of one format, settings and tokenizer.

    Raises:
        UserError: there are no weights, or several GGUF files.
    """
    top = [name for name in names if "/" not in name and not NOT_WEIGHTS.fullmatch(name)]
    for suffix in WEIGHTS:
        weights = [name for name in top if name.endswith(suffix)]
        if suffix == ".gguf" and len(weights) > 1 and not all("-of-" in name for name in weights):
            raise UserError(f"{len(weights)} GGUF files; name one as hf://ORG/NAME/{weights[0]}")
        if weights:
            return [name for name in top if PurePath(name).suffix in BESIDE] + weights
    raise UserError("no weights among the files of the model; give another model")
