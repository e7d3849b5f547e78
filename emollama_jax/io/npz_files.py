"""NumPy's .npz and .npy files of texts, lists and dictionaries, read without running what a pickle in them may call.

    read_npz("results.npz")["name2reason"]  # {"sample_00000000": "She smiles ...", ...}

NumPy keeps objects as pickles. Only those are read that are made of Python's own texts, numbers, lists and dictionaries
and of NumPy's arrays.
"""

import io
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from emollama_jax.errors import UserError, first_line
from emollama_jax.io.atomic import write_bytes
from emollama_jax.io.paths import PathLike, as_path

_NUMPY = {"_reconstruct", "scalar", "ndarray", "dtype"}


class _PlainUnpickler(pickle.Unpickler):
    """Makes arrays and plain values, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.split(".")[0] == "numpy" and name in _NUMPY) or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"holds an object of {module}.{name}")


def read_npz(path: PathLike) -> dict[str, Any]:
    """Reads the arrays of a .npz by name; what was a dictionary or another single object is that object.

    Raises:
        UserError: it cannot be read, or holds objects that are not plain.
    """
    data = _bytes(path)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            return {name.removesuffix(".npy"): _read_array(file.read(name)) for name in file.namelist()}
    except (zipfile.BadZipFile, ValueError, EOFError, pickle.UnpicklingError, zipfile.LargeZipFile) as error:
        raise UserError(f"not a NumPy archive of plain values: {path} ({first_line(error)}); save it again") from error


def read_npy(path: PathLike) -> Any:
    """Reads a .npy. Raises UserError as `read_npz`."""
    try:
        return _read_array(_bytes(path))
    except (ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"not a NumPy file of plain values: {path} ({first_line(error)}); save it again") from error


def write_npz(path: PathLike, arrays: Mapping[str, Any]) -> None:
    """Writes arrays, or objects that NumPy pickles, as a compressed .npz."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write_bytes(path, file.getvalue())


def _bytes(path: PathLike) -> bytes:
    try:
        return as_path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); check the path") from error


def _read_array(data: bytes) -> Any:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"version {version} of the format")
    _, _, dtype = read_header[version](file)
    if not dtype.hasobject:
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        return array[()] if array.ndim == 0 else array
    value = _PlainUnpickler(file).load()
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
