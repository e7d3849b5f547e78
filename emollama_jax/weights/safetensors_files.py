"""Safetensors files read one tensor at a time, and folders of them written."""

import json
import math
import os
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from emollama_jax.errors import UserError
from emollama_jax.io.atomic import write_json
from emollama_jax.weights.tensors import Contents, StoredTensor, check_finite, damaged

INDEX = "model.safetensors.index.json"
# What the NumPy side of safetensors can hold; the 8-bit and smaller floats are missing there.
SAFETENSORS_DTYPES = {
    **{f"{kind}{8 * size}": np.dtype(f"<{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
    **{"BF16": np.dtype(ml_dtypes.bfloat16), "BOOL": np.dtype(bool), "C64": np.dtype("<c8")},
}


def open_safetensors(path: Path) -> Contents:
    """Returns the tensors of one safetensors file, and its metadata. Only the header is read here.

    The file stays open, and each tensor is read into memory of its own as it is asked for: a mapping of the whole file,
    as safetensors has it, takes address space for all that the file holds.

    Raises:
        UserError: the file is damaged, or holds a dtype that NumPy has no counterpart for.
    """
    try:
        with safe_open(path, framework="numpy"):  # checks the header against the file's size
            file = _File(path)
    except SafetensorError as error:
        raise damaged(path, "safetensors") from error
    length = int.from_bytes(file.read(0, 8), "little")
    header = json.loads(file.read(8, length).tobytes())
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        if (dtype := SAFETENSORS_DTYPES.get(entry["dtype"])) is None:
            raise UserError(
                f"cannot read the data type {entry['dtype']} of tensor {name}: {path}; "
                "use a float32, float16 or bfloat16 version of these weights"
            )
        shape, start = tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]

        def read(shape=shape, start=start, dtype=dtype) -> np.ndarray:
            return file.read(start, math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

        tensors[name] = StoredTensor(shape, read)
    # Of tensors that share their memory safetensors' save_model keeps one, and its name beside the others'.
    shared = {name: tensors[kept] for name, kept in metadata.items() if kept in tensors and name not in tensors}
    return tensors | shared, metadata


class _File:
    """A file that is read at any place by any thread, and stays readable when its name is gone."""

    def __init__(self, path: Path):
        self._path, self._descriptor = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, start: int, size: int) -> np.ndarray:
        """Returns bytes. Raises UserError where the file ends before."""
        data = np.empty(size, np.uint8)
        done = 0
        while done < size:  # the system reads at most 2 GiB at once
            if not (got := os.preadv(self._descriptor, [data[done:]], start + done)):
                raise damaged(self._path, "safetensors")
            done += got
        return data


def save_safetensors(path: Path, tensors: Mapping[str, np.ndarray], **metadata: str) -> None:
    """Writes one safetensors file that torch's side reads too, with the permissions of any other new file.

    Raises:
        UserError: a tensor holds NaN or infinity.
    """
    contiguous = {name: np.asarray(array, order="C") for name, array in tensors.items()}  # it writes the raw buffer
    check_finite(contiguous)
    path.touch()
    mode = path.stat().st_mode  # safetensors makes files that only their owner may read
    save_file(contiguous, path, metadata={"format": "pt", **metadata})  # transformers refuses files without the format
    path.chmod(mode)


def write_safetensors_folder(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], *, max_shard_bytes: int = 5 * 2**30
) -> None:
    """Writes named tensors into an existing folder the way Hugging Face names the files.

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
    write_json(folder / INDEX, index)
