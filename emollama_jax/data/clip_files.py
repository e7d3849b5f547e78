"""The files of clips: found by name in their folders, and features read without trust in what they say.

Axes: T frames.
"""

import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath

import numpy as np
from jaxtyping import Float

from emollama_jax.data.tables import key_of, stem_of
from emollama_jax.errors import UserError

FEATURE_SIZE = 1024
_HEADER_LOCK = threading.Lock()  # Python 3.11 may not parse in two threads at once (SystemError)


def is_file_name(name: str) -> bool:
    """Whether a name leads nowhere: to no other folder or drive, on no system."""
    return (
        PureWindowsPath(name).name == name  # which knows "/", "\\" and "C:"
        and name not in ("", ".", "..")
        and not any(ord(character) < 32 or ord(character) == 127 for character in name)
    )


def files_of(folder: Path | None, suffixes: Sequence[str]) -> dict[str, Path]:
    """The files of a folder by `key_of` their name, by stem and by whole name, each going before the former.

    Of files that differ in the suffix alone, the stem means the one whose suffix comes first in `suffixes`.
    """
    if folder is None:
        return {}
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if os.path.splitext(e.name)[1].lower() in suffixes and e.is_file()]
    except OSError as error:
        raise UserError(f"cannot list the folder {folder} ({error.strerror}); check the path") from error
    names.sort(key=lambda name: (-suffixes.index(os.path.splitext(name)[1].lower()), name))
    stems = [os.path.splitext(name)[0] for name in names]
    by_key = {key_of(stem): folder / name for stem, name in zip(stems, names, strict=True)}
    by_stem = {stem: folder / name for stem, name in zip(stems, names, strict=True)}
    return by_key | by_stem | {name: folder / name for name in names}


def select_file(files: dict[str, Path], name: str) -> Path | None:
    """The file of a clip among those of `files_of`, or None."""
    return files.get(name) or files.get(stem_of(name)) or files.get(key_of(name))


class FeatureError(UserError):
    """A feature file that cannot be used.

    Attributes:
        kind: that of the problem it is.
        reason: the message without the path.
    """

    def __init__(self, kind: str, path: str | Path, fault: str):
        self.kind = kind
        self.reason = f"{fault}; extract the feature again, or remove the file"
        super().__init__(f"{path}: {self.reason}")


def read_feature(path: str | Path) -> Float[np.ndarray, " 1024"]:
    """A clip's feature from a .npy file, float32; one of several frames, [T, 1024], is averaged over these.

    Nothing is ever unpickled, and nothing is read before its type, shape and size are known to be right.

    Raises:
        FeatureError: the file is not there, or does not hold 1024 finite numbers (a frame).
    """
    try:
        with open(path, "rb") as file:
            old = np.lib.format.read_magic(file) == (1, 0)
            read_header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            with _HEADER_LOCK:
                shape, is_fortran, dtype = read_header(file)
            if dtype.hasobject:
                raise FeatureError("object_dtype", path, "holds pickled Python objects, not numbers")
            if dtype.kind not in "fiu":
                raise FeatureError("unreadable_feature", path, f"holds {dtype}, not real numbers")
            if len(shape) not in (1, 2) or shape[-1] != FEATURE_SIZE or 0 in shape:
                wanted = f"[{FEATURE_SIZE}], [1, {FEATURE_SIZE}] or [T, {FEATURE_SIZE}]"
                raise FeatureError("wrong_shape", path, f"the shape is {list(shape)}, not {wanted}")
            if os.fstat(file.fileno()).st_size < file.tell() + math.prod(shape) * dtype.itemsize:
                raise FeatureError("unreadable_feature", path, "cut short")
            array = np.fromfile(file, dtype, math.prod(shape)).reshape(shape, order="F" if is_fortran else "C")
    except OSError as error:
        raise FeatureError("unreadable_feature", path, f"cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError) as error:  # no header, or one that makes no sense
        raise FeatureError("unreadable_feature", path, "not a .npy file, or damaged") from error
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is found below
        array = array.astype(np.float32, copy=False).reshape(-1, FEATURE_SIZE)
    if not np.isfinite(array).all():
        raise FeatureError("not_finite", path, "holds numbers that are not finite, or too large for float32")
    return array.mean(axis=0, dtype=np.float64).astype(np.float32)
