"""Weight files read one tensor at a time, whatever their format.

A file reader is a function from one file to (its tensors, what else the file says). `open_source` finds the files of
a model, reads their index and joins them into one `WeightSource`.
"""

import json
from pathlib import PurePath
from typing import Any

from etils.epath import Path

from emollama_jax.errors import UserError
from emollama_jax.io.paths import PathLike, as_path, local_copy
from emollama_jax.weights.flax_msgpack import open_flax
from emollama_jax.weights.gguf_files import open_gguf
from emollama_jax.weights.safetensors_files import open_safetensors
from emollama_jax.weights.tensors import Contents, StoredTensor, WeightSource, damaged
from emollama_jax.weights.torch_files import open_torch

INDEX_SUFFIX = ".index.json"
LFS_PREFIX = b"version https://git-lfs"
# File suffix -> format, in order of preference where a folder holds several.
FORMATS = {
    ".safetensors": "safetensors",
    ".bin": "torch",
    ".pth": "torch",
    ".pt": "torch",
    ".msgpack": "flax",
    ".gguf": "gguf",
}
# Well-known file names (each may have an index instead), in order of preference.
MAIN_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "flax_model.msgpack",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
READERS = {"safetensors": open_safetensors, "torch": open_torch, "flax": open_flax, "gguf": open_gguf}


def open_source(path: PathLike) -> WeightSource:
    """Opens the weights at `path`: a model folder, one weights file, or the index of a sharded model.

    The format is told from the file's first bytes, and from its name when those say nothing. A folder that holds
    several formats is read as safetensors, else torch, else Flax, else GGUF.

    Raises:
        UserError: nothing there, no weights among it, or files that are damaged, incomplete, unsafe or unsupported.
    """
    found = as_path(path)
    if not found.exists():
        raise UserError(f"no such file or folder: {path}; check the path")
    entry = _find_entry(found) if found.is_dir() else found
    format = _format_of(entry)
    if entry.name.endswith(INDEX_SUFFIX):
        tensors, extra = _open_shards(entry, format)
    else:
        tensors, extra = _open_file(entry, format)
    config = extra if format == "gguf" else _read_config(entry.parent)
    return WeightSource(path, format, tensors, config, extra)


def _find_entry(folder: Path) -> Path:
    """The weights file of a folder, or its index: a well-known name, else the only file of its format."""
    for name in MAIN_FILES:
        for entry in (folder / name, folder / f"{name}{INDEX_SUFFIX}"):
            if entry.is_file():
                return entry
    files = sorted(file for file in folder.iterdir() if file.is_file())
    for format in dict.fromkeys(FORMATS.values()):
        found = [file for file in files if FORMATS.get(file.suffix) == format]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(
                f"{len(found)} {format} files and no *{INDEX_SUFFIX}: {folder}; copy the index too, or name one file"
            )
    raise UserError(
        f"no weights in this folder: {folder}; "
        "it needs model.safetensors, pytorch_model.bin, flax_model.msgpack, their shards with an index, or a .gguf file"
    )


def _format_of(path: Path) -> str:
    """The format of a weights file or index."""
    head = _check_head(path)
    # GGUF first: its tensor count may look like the brace that opens a safetensors header.
    if head.startswith(b"GGUF"):
        return "gguf"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().length:
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"\x80")):  # a zip archive; a bare pickle
        return "torch"
    format = FORMATS.get(PurePath(path.name.removesuffix(INDEX_SUFFIX)).suffix)
    if format is None:
        raise UserError(f"not a weights file of a known kind: {path}; give a {', '.join(FORMATS)} file or their folder")
    return format


def _check_head(path: Path) -> bytes:
    """The first bytes of a file that can be read, is not empty and is not a git-lfs pointer."""
    try:
        with path.open("rb") as file:
            head = file.read(len(LFS_PREFIX))
    except OSError as error:
        raise UserError(f"cannot read the file ({error.strerror}): {path}; check its permissions") from error
    if not head:
        raise UserError(f"the file is empty: {path}; download or copy it again")
    if head == LFS_PREFIX:
        raise UserError(f"a git-lfs pointer instead of the weights: {path}; run 'git lfs pull' where it came from")
    return head


def _open_file(path: Path, format: str) -> Contents:
    """Reads one file of a known format."""
    _check_head(path)
    with local_copy(path) as file:
        return READERS[format](file)


def _open_shards(index: Path, format: str) -> Contents:
    """Joins the shards that an index names.

    A tensor that the index does not mention is offered too: the caller decides what to drop.
    """
    weight_map = _read_json(index).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise damaged(index, "weights index")
    paths = {shard: index.parent / shard for shard in sorted(set(weight_map.values()))}
    missing = [path for path in paths.values() if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} shards in {index.name} are missing, first: {missing[0]}; copy them too"
        )
    shards = {shard: _open_file(path, format) for shard, path in paths.items()}
    tensors: dict[str, StoredTensor] = {}
    extra: dict[str, Any] = {}
    for shard_tensors, shard_extra in shards.values():
        tensors |= shard_tensors
        extra |= shard_extra
    for name, shard in weight_map.items():
        if name not in shards[shard][0]:
            raise UserError(
                f"tensor {name} is not in the shard that {index.name} names: {paths[shard]}; "
                "download or copy the index and all shards again"
            )
        tensors[name] = shards[shard][0][name]
    return tensors, extra


def _read_config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    return _read_json(path) if path.is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, "JSON") from error
    if not isinstance(value, dict):
        raise damaged(path, "JSON object")
    return value
