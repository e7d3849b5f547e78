"""Flax checkpoints (`flax_model.msgpack`), read one tensor at a time from a memory map.

`flax.serialization.msgpack_restore` needs the whole file in memory, and a leaf that stacks the layers takes a piece
from every shard. So this reader walks the file's structure once, notes where each array's bytes lie, and copies them
on demand.

The format: nested msgpack maps. An array is an extension object whose payload is itself msgpack, the list (shape,
dtype name, bytes). An array beyond 1 GiB is a map with the key `__msgpack_chunked_array__`, its `shape` as a map
from "0", "1", … to the sizes, and its flat pieces in the same way under `chunks`.
"""

import math
import mmap
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (makes np.dtype("bfloat16") known)
import msgpack
import numpy as np

from emollama_jax.weights.tensors import Contents, StoredTensor, damaged, flatten

_CHUNKED = "__msgpack_chunked_array__"
_ARRAY_CODES = (1, 3)  # Flax's extension codes for arrays and NumPy scalars
_FIXED_EXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}  # marker -> payload bytes
_SIZED_EXT = {0xC7: 1, 0xC8: 2, 0xC9: 4}  # marker -> width of the number of payload bytes
_BINARY = {0xC4: 1, 0xC5: 2, 0xC6: 4}  # the same for plain bytes
_WINDOW = 1 << 16  # bytes shown to msgpack at once; keys, scalars and array headers are far shorter


@dataclass(frozen=True)
class _Array:
    """Where an array's bytes lie: one (start, stop) range, or several for a chunked array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    ranges: tuple[tuple[int, int], ...]

    def __post_init__(self):
        if not all(isinstance(size, int) and size >= 0 for size in self.shape):
            raise ValueError("impossible shape")
        if self.dtype.hasobject or not self.dtype.itemsize:
            raise ValueError("impossible dtype")
        if math.prod(self.shape) * self.dtype.itemsize != sum(stop - start for start, stop in self.ranges):
            raise ValueError("shape and data disagree")


def open_flax(path: Path) -> Contents:
    """The tensors of one msgpack file under names joined with "/", and the other values in it.

    Raises:
        UserError: the file is damaged or was not written by Flax.
    """
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        tree, end = _parse(data, 0)
        if end != len(data) or not isinstance(tree, dict):
            raise ValueError("not one map")
        leaves = dict(flatten(tree))
    except (msgpack.UnpackException, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, "Flax msgpack") from error
    tensors, extra = {}, {}
    for name, leaf in leaves.items():
        if isinstance(leaf, _Array):
            tensors[name] = StoredTensor(leaf.shape, partial(_read, data, leaf))
        else:
            extra[name] = leaf
    return tensors, extra


def _parse(data: mmap.mmap, at: int) -> tuple[Any, int]:
    """The value that starts at an offset, arrays as `_Array`, and the offset behind it."""
    marker = data[at]
    if 0x80 <= marker <= 0x8F or marker in (0xDE, 0xDF):
        unpacker = _unpacker(data, at)
        count = unpacker.read_map_header()
        at += unpacker.tell()
        tree = {}
        for _ in range(count):
            key, at = _parse(data, at)
            tree[key], at = _parse(data, at)
        return (_join(tree) if _CHUNKED in tree else tree), at
    if marker in _FIXED_EXT or marker in _SIZED_EXT:
        width = _SIZED_EXT.get(marker, 0)
        size = _FIXED_EXT.get(marker) or _number(data, at + 1, width)
        start = at + 2 + width
        if data[start - 1] in _ARRAY_CODES:
            return _parse_array(data, start, start + size), start + size
    unpacker = _unpacker(data, at)
    return unpacker.unpack(), at + unpacker.tell()


def _parse_array(data: mmap.mmap, start: int, stop: int) -> _Array:
    """The array in an extension payload."""
    unpacker = _unpacker(data, start)
    if unpacker.read_array_header() != 3:
        raise ValueError("not an array")
    shape, dtype = tuple(unpacker.unpack()), unpacker.unpack()
    if not dtype.isidentifier():  # np.dtype takes more than names
        raise ValueError("not a dtype name")
    at = start + unpacker.tell()
    width = _BINARY[data[at]]
    begin = at + 1 + width
    if begin + _number(data, at + 1, width) != stop or stop > len(data):
        raise ValueError("array cut short")
    return _Array(shape, np.dtype(dtype), ((begin, stop),))


def _join(tree: dict[str, Any]) -> _Array:
    """One array from the map that describes its chunks."""
    sizes, chunks = tree["shape"], tree["chunks"]
    pieces = [chunks[str(number)] for number in range(len(chunks))]
    ranges = tuple(span for piece in pieces for span in piece.ranges)
    return _Array(tuple(sizes[str(axis)] for axis in range(len(sizes))), pieces[0].dtype, ranges)


def _unpacker(data: mmap.mmap, at: int) -> msgpack.Unpacker:
    unpacker = msgpack.Unpacker(strict_map_key=False)
    unpacker.feed(data[at : at + _WINDOW])
    return unpacker


def _number(data: mmap.mmap, at: int, width: int) -> int:
    return int.from_bytes(data[at : at + width], "big")


def _read(data: mmap.mmap, array: _Array) -> np.ndarray:
    """Copy an array out of the file; its bytes there lie at odd addresses."""
    out = np.empty(array.shape, array.dtype)
    flat, at = out.reshape(-1).view(np.uint8), 0
    for start, stop in array.ranges:
        flat[at : at + stop - start] = np.frombuffer(data, np.uint8, stop - start, start)
        at += stop - start
    return out
