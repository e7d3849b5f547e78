"""Named tensors that are read one by one, whatever the format of their files."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from emollama_jax.errors import UserError
from emollama_jax.io.paths import PathLike


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its shape, known without reading the data, and the function that reads it."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


Contents = tuple[dict[str, StoredTensor], dict[str, Any]]


class WeightSource:
    """Named tensors that are read one by one; a context that lets go of their files.

    Attributes:
        path: The folder or file that was opened, as it was given.
        format: "safetensors", "torch", "flax", "gguf", or "arrays" for arrays in memory.
        config: The `config.json` beside the tensors, or None; for GGUF the file's metadata.
        extra: What the files hold beside tensors, by name: a torch checkpoint's epoch or config, safetensors metadata.
        outside: Names of tensors in the file that are beside the model's: an optimizer's.
    """

    def __init__(
        self,
        path: PathLike,
        format: str,
        tensors: Mapping[str, StoredTensor],
        config: dict[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        outside: tuple[str, ...] = (),
    ):
        self.path = epath.Path(path)
        self.format = format
        self.config = config
        self.extra = dict(extra or {})
        self.outside = outside
        self._tensors = dict(tensors)

    def names(self) -> list[str]:
        """Returns all tensor names, sorted."""
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor without reading its data. Raises KeyError for an unknown name."""
        return self._tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor in its stored dtype (GGUF: float32), maybe a view on the file. Raises KeyError."""
        return self._tensors[name].read()

    def read_weights(self, name: str) -> np.ndarray:
        """Reads one tensor as `read` does, where it must be weights.

        Raises:
            UserError: it holds integers, which are quantised weights without what they are multiplied by, or numbers
                that are not finite.
        """
        array = self.read(name)
        if not is_float(array.dtype):
            raise UserError(
                f"tensor {name} holds {array.dtype} numbers, not floats: {self.path}; if the weights are quantised, "
                "use their float version, or a GGUF file"
            )
        if not np.all(np.isfinite(array)):
            raise UserError(f"tensor {name} holds NaN or infinity: {self.path}; download or copy it again")
        return array

    def stored(self, name: str) -> StoredTensor:
        """Returns a tensor as it lies in the file. Raises KeyError for an unknown name."""
        return self._tensors[name]

    def with_tensors(self, tensors: Mapping[str, StoredTensor]) -> "WeightSource":
        """Returns the same source with other tensors: renamed, or computed from the file's as they are read."""
        return WeightSource(self.path, self.format, tensors, self.config, self.extra, self.outside)

    def close(self) -> None:
        """Lets go of the files. A closed source has no tensors; arrays read before stay valid."""
        self._tensors = {}

    def __enter__(self) -> "WeightSource":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def damaged(path: PathLike, kind: str) -> UserError:
    """Returns the error for a file that the reader of its format cannot make sense of."""
    return UserError(f"not a {kind} file, or damaged or cut short: {path}; download or copy it again")


def is_float(dtype: np.dtype) -> bool:
    """Whether numbers of a dtype are real floats, bfloat16 too."""
    return dtype.kind == "f" or dtype == ml_dtypes.bfloat16


def check_fits(name: str, array: np.ndarray, dtype: np.dtype, path: PathLike) -> None:
    """Raises UserError when a finite tensor has values that the float `dtype` does not reach."""
    if not array.size or ml_dtypes.finfo(dtype).max >= ml_dtypes.finfo(array.dtype).max:
        return
    extremes = np.array([array.min(), array.max()])
    with np.errstate(over="ignore"):
        fits = np.all(np.isfinite(extremes.astype(dtype)))
    if not fits:
        largest = float(np.abs(extremes.astype(np.float64)).max())
        raise UserError(
            f"tensor {name} has values up to {largest:.3g}, which {dtype} cannot hold: {path}; use bfloat16 or float32"
        )


def check_finite(tensors: Mapping[str, np.ndarray]) -> None:
    """Raises UserError for a tensor, about to be written, that holds NaN or infinity."""
    for name, array in tensors.items():
        if is_float(array.dtype) and not np.all(np.isfinite(array)):
            raise UserError(
                f"NaN or infinity in tensor {name}, written as {array.dtype}; write bfloat16 or float32, and if that "
                "fails too, get the weights again"
            )


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested dicts, with "/" between the levels of their names."""
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, item in value.items():
        yield from flatten(item, f"{prefix}/{key}" if prefix else str(key))
