"""Weight files read one tensor at a time, whatever their format.

A file reader is a function from one file to (its tensors, what else the file says). `open_source` finds the files of
a model, reads their index and joins them into one `WeightSource`. What a file is its first bytes tell, not its name.
"""

import codecs
import re
from pathlib import PurePath
from typing import Any

from etils.epath import Path

from emollama_jax.errors import UserError
from emollama_jax.io.json_files import read_json_object
from emollama_jax.io.paths import PathLike, is_file, local_copy
from emollama_jax.weights.flax_msgpack import open_flax
from emollama_jax.weights.gguf_files import open_gguf
from emollama_jax.weights.locate import is_hub_name, locate
from emollama_jax.weights.safetensors_files import open_safetensors
from emollama_jax.weights.state_dict import inside_container, without_wrappers
from emollama_jax.weights.tensors import StoredTensor, WeightSource, damaged
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
MODEL_FILES = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# What trainers and we ourselves put beside a model's weights.
OTHER_FILES = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state).*|projectors\.safetensors")
GGUF_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
READERS = {"safetensors": open_safetensors, "torch": open_torch, "flax": open_flax, "gguf": open_gguf}


def open_source(path: PathLike, main_files: tuple[str, ...] = MODEL_FILES) -> WeightSource:
    """Opens the weights at `path`: a folder, one weights file, the index of a sharded model, or a model of the hub
    (`weights/locate.py`).

    A folder that holds several formats is read as safetensors, else torch, else Flax, else GGUF.

    Args:
        main_files: what the file to read of a folder is called: `MODEL_FILES` or `ADAPTER_FILES`.

    Raises:
        UserError: nothing there, no weights among it, or files that are damaged, incomplete, unsafe or unsupported.
    """
    found = locate(path)
    if not (is_file(found) or found.exists()):
        raise UserError(f"no such file or folder: {path}; check the path")
    entry = _find_entry(found, main_files) if found.is_dir() else found
    outside: tuple[str, ...] = ()
    if entry.name.endswith(INDEX_SUFFIX):
        format, tensors, extra = _open_shards(entry)
    else:
        format, tensors, extra = _open_file(entry)
    if format == "gguf" and extra.get("split.count", 0) > 1:
        tensors, extra = _open_split(entry, extra["split.count"])
    if format == "torch":
        tensors, outside = inside_container(tensors, path)
    if format in ("torch", "safetensors"):
        tensors = without_wrappers(tensors)
    config = extra if format == "gguf" else read_config(entry.parent)
    return WeightSource(found if is_hub_name(path) else path, format, tensors, config, extra, outside)


def _find_entry(folder: Path, main_files: tuple[str, ...]) -> Path:
    """The weights file of a folder, or its index: a well-known name, else the only file of its format."""
    for name in main_files:
        for entry in (folder / name, folder / f"{name}{INDEX_SUFFIX}"):
            if is_file(entry):
                return entry
    others = (set(MODEL_FILES) | set(ADAPTER_FILES)) - set(main_files)
    files = [file for file in sorted(folder.iterdir()) if PurePath(file.name).suffix in FORMATS and is_file(file)]
    passed = [file.name for file in files if file.name in others]
    files = [file for file in files if file.name not in others and not OTHER_FILES.fullmatch(file.name)]
    for format in dict.fromkeys(FORMATS.values()):
        found = [file for file in files if FORMATS[PurePath(file.name).suffix] == format]
        parts = {match and (match[1], match[3]) for match in (GGUF_PART.fullmatch(file.name) for file in found)}
        if len(found) == 1 or (len(parts) == 1 and None not in parts):
            return found[0]
        if found:
            raise UserError(
                f"{len(found)} {format} files and no *{INDEX_SUFFIX}: {folder}; copy the index too, or name one file"
            )
    if snapshots := [inner for inner in (folder / "snapshots").iterdir()] if (folder / "snapshots").is_dir() else []:
        raise UserError(f"the folder of a download cache: {folder}; give a snapshot in it, e.g. {snapshots[0]}")
    if passed:
        kinds = ("an adapter's", "a model's") if main_files == MODEL_FILES else ("a model's", "an adapter's")
        raise UserError(f"{kinds[0]} weights instead of {kinds[1]}, {passed[0]}: {folder}; give another folder")
    raise UserError(
        f"no weights in this folder: {folder}; "
        "it needs model.safetensors, pytorch_model.bin, flax_model.msgpack, their shards with an index, or a .gguf file"
    )


def _format_of(path: Path) -> str:
    """The format of a weights file, from its first bytes; its name is asked when those say nothing."""
    head = _check_head(path)
    # GGUF first: its tensor count may look like the brace that opens a safetensors header.
    if head.startswith(b"GGUF"):
        return "gguf"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().length:
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"\x80")):  # a zip archive; a bare pickle
        return "torch"
    if re.match(rb"(?:[\x81-\x8f]|\xde..|\xdf....)[\xa0-\xbf\xd9\xda]", head, re.DOTALL):  # a map's first name
        return "flax"
    if _is_text(head):
        raise UserError(
            f"text instead of weights, maybe a web page: {path}; download it again, or give the weights file itself"
        )
    format = FORMATS.get(PurePath(path.name).suffix)
    if format is None:
        raise UserError(f"not a weights file of a known kind: {path}; give a {', '.join(FORMATS)} file or their folder")
    return format


def _is_text(head: bytes) -> bool:
    """Whether the first bytes of a file are text; a character that is cut at their end does not matter."""
    head = head.removeprefix(codecs.BOM_UTF8)
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        text = head[: error.start].decode() if error.start > len(head) - 4 else ""
    return len(text) > 3 and all(character.isprintable() or character.isspace() for character in text)


def _check_head(path: Path) -> bytes:
    """The first bytes of a file that can be read, is not empty and is not a git-lfs pointer."""
    try:
        with path.open("rb") as file:
            head = file.read(256)
    except OSError as error:
        raise UserError(f"cannot read the file ({error.strerror}): {path}; check its permissions") from error
    if not head:
        raise UserError(f"the file is empty: {path}; download or copy it again")
    if head.startswith(LFS_PREFIX):
        raise UserError(f"a git-lfs pointer instead of the weights: {path}; run 'git lfs pull' where it came from")
    return head


def _open_file(path: Path) -> tuple[str, dict[str, StoredTensor], dict[str, Any]]:
    """The format of one file, and what its reader makes of it."""
    format = _format_of(path)
    with local_copy(path) as file:
        return format, *READERS[format](file)


def _open_shards(index: Path) -> tuple[str, dict[str, StoredTensor], dict[str, Any]]:
    """Joins the shards that an index names.

    A tensor that the index does not mention is offered too: the caller decides what to drop.
    """
    _check_head(index)
    weight_map = _read_json(index).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise damaged(index, "weights index")
    paths = {shard: index.parent / shard for shard in sorted(set(weight_map.values()))}
    missing = [path for path in paths.values() if not is_file(path)]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} shards in {index.name} are missing, first: {missing[0]}; copy them too"
        )
    shards = {shard: _open_file(path) for shard, path in paths.items()}
    formats = {format for format, _, _ in shards.values()}
    if len(formats) > 1:
        raise UserError(f"shards of several formats, {', '.join(sorted(formats))}: {index}; download them again")
    tensors: dict[str, StoredTensor] = {}
    extra: dict[str, Any] = {}
    for _, shard_tensors, shard_extra in shards.values():
        tensors |= shard_tensors
        extra |= shard_extra
    for name, shard in weight_map.items():
        if name not in shards[shard][1]:
            raise UserError(
                f"tensor {name} is not in the shard that {index.name} names: {paths[shard]}; "
                "download or copy the index and all shards again"
            )
        tensors[name] = shards[shard][1][name]
    return formats.pop(), tensors, extra


def _open_split(part: Path, count: int) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Joins the parts of a GGUF file that llama.cpp's gguf-split wrote; the first holds the metadata."""
    match = GGUF_PART.fullmatch(part.name)
    if not match or int(match[3]) != count:
        raise UserError(
            f"one of {count} parts of a GGUF file: {part}; give it its name ...-00001-of-{count:05d}.gguf again, with "
            "the other parts beside it"
        )
    paths = [part.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf") for number in range(1, count + 1)]
    if missing := [path for path in paths if not is_file(path)]:
        raise UserError(f"{len(missing)} of {count} parts are missing, first: {missing[0]}; copy them too")
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, Any] = {}
    for number, path in enumerate(paths):
        _, part_tensors, part_metadata = _open_file(path)
        if (part_metadata.get("split.no"), part_metadata.get("split.count")) != (number, count):
            raise UserError(f"not part {number + 1} of {count}: {path}; download or copy all parts again")
        metadata = part_metadata if number == 0 else metadata
        tensors |= part_tensors
    if metadata.get("split.tensors.count", len(tensors)) != len(tensors):
        raise damaged(part, "GGUF")
    return tensors, metadata


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any] | None:
    """A JSON object beside the weights, or None. Raises UserError when the file is damaged."""
    path = folder / name
    return _read_json(path) if is_file(path) else None


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise damaged(path, "JSON object") from error
