"""Torch checkpoints (`.bin`, `.pth`, `.pt`), read without running anything they hold, and written.

Nested dicts are flattened with "/" between the levels: `{"model": {"a.weight": t}}` gives `model/a.weight`.
"""

import argparse
import contextlib
import pickle
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from emollama_jax.errors import UserError
from emollama_jax.io.atomic import atomic_file
from emollama_jax.io.paths import PathLike
from emollama_jax.weights.tensors import Contents, StoredTensor, check_finite, damaged, flatten


def open_torch(path: Path) -> Contents:
    """The tensors of one torch checkpoint, and the values beside them (epoch, config, …) under flattened names.

    Zip checkpoints are memory-mapped and cost address space only; the older form is read whole.

    Raises:
        UserError: torch is not installed, or the file is damaged, holds code, or holds no dict or unreadable tensors.
    """
    torch = import_torch(path)
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        with torch.serialization.safe_globals(_known_classes()), _named_as_torch(path) as named:
            checkpoint = torch.load(named, map_location="cpu", weights_only=True, mmap=is_zip)
        leaves = dict(flatten(checkpoint))
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        holds = culprit[1] if culprit else "something other than tensors and plain values, or is damaged"
        raise UserError(
            f"refused, nothing was executed: the pickle holds {holds}: {path}; get or make a safetensors version of it"
        ) from error
    except Exception as error:  # a damaged pickle can fail in any instruction, with any exception
        raise damaged(path, "torch checkpoint") from error
    if not isinstance(checkpoint, dict):
        raise UserError(
            f"the checkpoint holds a {type(checkpoint).__name__} instead of a dict of tensors: {path}; "
            "save the model's state_dict()"
        )
    tensors, extra = {}, {}
    for name, leaf in leaves.items():
        if isinstance(leaf, torch.Tensor):
            array = _as_numpy(name, leaf, path)
            tensors[name] = StoredTensor(array.shape, lambda array=array: array)
        else:
            extra[name] = leaf
    return tensors, extra


@contextlib.contextmanager
def _named_as_torch(path: Path) -> Iterator[Path]:
    """Gives a path to the file that does not end in ".safetensors": torch takes it for what its name says."""
    if path.suffix != ".safetensors":
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="emollama-") as folder:
        link = Path(folder) / "checkpoint.pth"
        link.symlink_to(path.resolve())
        yield link  # a file that is mapped stays so when the link is gone


class Ignored:
    """Stands for an object beside the tensors, of a class that nothing here needs; none of the class's code runs."""

    def __new__(cls, *arguments: Any) -> "Ignored":
        return object.__new__(cls)

    def __init__(self, *arguments: Any):
        del arguments

    def __setstate__(self, state: Any) -> None:
        del state


def _plain_dict(*default_factory: Any) -> dict[Any, Any]:
    """What a defaultdict becomes."""
    return {}


def _known_classes() -> list[Any]:
    """Classes that training scripts save beside tensors, with what stands for each: see torch's `safe_globals`."""
    ignored = ["types.SimpleNamespace", "uuid.UUID", "torch.torch_version.TorchVersion"]
    ignored += [f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        ignored += [f"{module}.scalar", f"{module}._reconstruct"]
    ignored += ["numpy.ndarray", "numpy.dtype", *(f"numpy.dtypes.{name}" for name in np.dtypes.__all__)]
    ignored += [
        f"builtins.{name}" for name in ("int", "float", "str", "bool", "list", "dict", "tuple", "frozenset", "range")
    ]
    for module in ("pathlib", "pathlib._local"):  # the second since Python 3.13
        paths = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath")
        ignored += [f"{module}.{name}" for name in paths]
    return [argparse.Namespace, (_plain_dict, "collections.defaultdict"), *((Ignored, name) for name in ignored)]


def import_torch(path: PathLike) -> Any:
    """The package torch, for a file at `path`. Raises UserError where it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"this file needs torch: {path}; pip install 'emollama_jax[convert]'") from error
    return torch


def save_torch(path: PathLike, tensors: Iterable[tuple[str, np.ndarray]], extra: Mapping[str, Any]) -> None:
    """Writes `{"model": the tensors by name, **extra}` into a new file, complete or not at all.

    Raises:
        UserError: torch is not installed, or a tensor holds NaN or infinity.
    """
    torch, tensors = import_torch(path), dict(tensors)
    check_finite(tensors)

    def as_tensor(array: np.ndarray) -> Any:
        array = np.array(array)  # its own memory: torch would save all of a view's
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    with atomic_file(path) as partial:
        torch.save({"model": {name: as_tensor(array) for name, array in tensors.items()}, **extra}, partial)


def _as_numpy(name: str, tensor: Any, path: Path) -> np.ndarray:
    """A view on a tensor's memory; nothing is read from the disk yet."""
    import torch

    try:
        tensor = tensor.detach()
        if tensor.dtype == torch.bfloat16:  # NumPy has no such type: pass the bits
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()
    except (TypeError, RuntimeError) as error:
        raise UserError(
            f"cannot read tensor {name} ({tensor.dtype}, {tensor.layout}): {path}; "
            "save it as a dense float32, float16 or bfloat16 tensor"
        ) from error
