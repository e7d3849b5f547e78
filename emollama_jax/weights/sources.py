"""Weight files read one tensor at a time, whatever their format, and safetensors folders written.

A file reader is a function from one file to (its tensors, what else the file says). `open_source` finds the files of
a model, reads their index and joins them into one `Source`.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from emollama_jax.errors import UserError

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
# What the NumPy side of safetensors can hold; the 8-bit and smaller floats are missing there.
SAFETENSORS_DTYPES = frozenset("F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL C64".split())


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its shape, known without reading the data, and the function that reads it."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


Contents = tuple[dict[str, StoredTensor], dict[str, Any]]


class Source:
    """Named tensors that are read one by one.

    Attributes:
        path: The folder or file that was opened, for messages.
        format: "safetensors", "torch", "flax", "gguf" or, of a training run, "orbax".
        config: The `config.json` beside the tensors, or None; for GGUF the file's metadata.
        extra: What the files hold beside tensors, by name: a torch checkpoint's epoch or config, safetensors metadata.
    """

    def __init__(
        self,
        path: Path,
        format: str,
        tensors: Mapping[str, StoredTensor],
        config: dict[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ):
        self.path = path
        self.format = format
        self.config = config
        self.extra = dict(extra or {})
        self._tensors = dict(tensors)

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; its data is not read. Raises KeyError for an unknown name."""
        return self._tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored dtype (GGUF: float32), maybe a view on the file. KeyError for an unknown name."""
        return self._tensors[name].read()

    def stored(self, name: str) -> StoredTensor:
        """A tensor as it lies in the file. Raises KeyError for an unknown name."""
        return self._tensors[name]

    def with_tensors(self, tensors: Mapping[str, StoredTensor]) -> "Source":
        """The same source with other tensors: renamed ones, or ones computed from the file's as they are read."""
        return Source(self.path, self.format, tensors, self.config, self.extra)

    def close(self) -> None:
        """Let go of the files. A closed source has no tensors; arrays read before stay valid."""
        self._tensors = {}

    def __enter__(self) -> "Source":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_source(path: str | Path) -> Source:
    """Open the weights at `path`: a model folder, one weights file, or the index of a sharded model.

    The format is told from the file's first bytes, and from its name when those say nothing. A folder that holds
    several formats is read as safetensors, else torch, else Flax, else GGUF.

    Raises:
        UserError: nothing there, no weights among it, or files that are damaged, incomplete, unsafe or unsupported.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"no such file or folder: {path}; check the path")
    entry = _find_entry(path) if path.is_dir() else path
    format = _format_of(entry)
    if entry.name.endswith(INDEX_SUFFIX):
        tensors, extra = _open_shards(entry, format)
    else:
        tensors, extra = _open_file(entry, format)
    config = extra if format == "gguf" else _read_config(entry.parent)
    return Source(path, format, tensors, config, extra)


def damaged(path: Path, kind: str) -> UserError:
    """The error for a file that its own format's reader cannot make sense of."""
    return UserError(f"not a {kind} file, or damaged or cut short: {path}; download or copy it again")


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, with "/" between the levels of their names."""
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, item in value.items():
        yield from flatten(item, f"{prefix}/{key}" if prefix else str(key))


def open_safetensors(path: Path) -> Contents:
    """The tensors of one safetensors file, and its metadata. Only the header is read here.

    Raises:
        UserError: the file is damaged, or holds a dtype that NumPy has no counterpart for.
    """
    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise damaged(path, "safetensors") from error
    tensors = {}
    for name in file.keys():
        header = file.get_slice(name)
        if header.get_dtype() not in SAFETENSORS_DTYPES:
            raise UserError(
                f"cannot read the data type {header.get_dtype()} of tensor {name}: {path}; "
                "use a float32, float16 or bfloat16 version of these weights"
            )
        tensors[name] = StoredTensor(tuple(header.get_shape()), lambda name=name: file.get_tensor(name))
    return tensors, file.metadata() or {}


def save_safetensors(path: Path, tensors: Mapping[str, np.ndarray], **metadata: str) -> None:
    """Write one safetensors file that torch's side reads too, with the permissions of any other new file."""
    path.touch()
    mode = path.stat().st_mode  # safetensors makes files that only their owner may read
    contiguous = {name: np.asarray(array, order="C") for name, array in tensors.items()}  # it writes the raw buffer
    save_file(contiguous, path, metadata={"format": "pt", **metadata})  # transformers refuses files without the format
    path.chmod(mode)


def write_safetensors_folder(
    folder: str | Path, tensors: Iterable[tuple[str, np.ndarray]], *, max_shard_bytes: int = 5 * 2**30
) -> None:
    """Write named tensors into an existing folder the way Hugging Face names the files.

    One shard becomes `model.safetensors`; more become `model-00001-of-0000N.safetensors` and an index. The tensors
    are taken one at a time and held until their shard is full, so an iterator keeps memory near one shard; an array
    must not change after it was handed over.

    Args:
        folder: Where to write; see `atomic_folder` for output that is never half there.
        tensors: (name, array) pairs, bfloat16 included.
        max_shard_bytes: Largest shard; a single larger tensor gets a shard of its own.

    Raises:
        ValueError: a name comes twice.
    """
    folder = Path(folder)
    shard_of: dict[str, int] = {}
    written: list[Path] = []
    shard: dict[str, np.ndarray] = {}
    shard_bytes = total_bytes = 0

    def write_shard() -> None:
        path = folder / f"model-{len(written) + 1:05d}.safetensors"
        save_safetensors(path, shard)
        written.append(path)

    for name, array in tensors:
        if name in shard_of:
            raise ValueError(f"tensor {name} comes twice")
        array = np.asarray(array)
        if shard and shard_bytes + array.nbytes > max_shard_bytes:
            write_shard()
            shard, shard_bytes = {}, 0
        shard[name] = array
        shard_of[name] = len(written)
        shard_bytes += array.nbytes
        total_bytes += array.nbytes
    write_shard()

    # How many shards there are is in their names, and known only now.
    if len(written) == 1:
        written[0].rename(folder / "model.safetensors")
        return
    final = [path.with_name(f"{path.stem}-of-{len(written):05d}.safetensors") for path in written]
    for old, new in zip(written, final, strict=True):
        old.rename(new)
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: final[number].name for name, number in sorted(shard_of.items())},
    }
    (folder / f"model.safetensors{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size:
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"\x80")):  # a zip archive; a bare pickle
        return "torch"
    format = FORMATS.get(Path(path.name.removesuffix(INDEX_SUFFIX)).suffix)
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
    """Read one file of a known format; the readers of the rarer formats are imported when needed."""
    _check_head(path)
    match format:
        case "safetensors":
            return open_safetensors(path)
        case "torch":
            from emollama_jax.weights.torch_files import open_torch

            return open_torch(path)
        case "flax":
            from emollama_jax.weights.flax_msgpack import open_flax

            return open_flax(path)
        case _:
            from emollama_jax.weights.gguf_files import open_gguf

            return open_gguf(path)


def _open_shards(index: Path, format: str) -> Contents:
    """Join the shards that an index names.

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
