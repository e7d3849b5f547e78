"""The files of clips: found by name in their folders, and features read without trust in what they say.

Axes: T frames.
"""

import math
import os
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath, PureWindowsPath

import numpy as np
from jaxtyping import Float

from emollama_jax.data.tables import key_of, stem_of
from emollama_jax.errors import UserError
from emollama_jax.io.text_encoding import decode_text

FEATURE_SIZE = 1024
_HEADER_LOCK = threading.Lock()  # Python 3.11 may not parse in two threads at once (SystemError)


def is_file_name(name: str) -> bool:
    """Whether a name leads nowhere: to no other folder or drive, on no system."""
    return (
        PureWindowsPath(name).name == name  # which knows "/", "\\" and "C:"
        and name not in ("", ".", "..")
        and not any(ord(character) < 32 or ord(character) == 127 for character in name)
    )


class FolderFiles:
    """The files below a folder, and by which names each is found.

    A file goes by its path below the folder, its name, its stem, and `key_of` its name, the former before the latter;
    those of the folder itself go before those in folders below it. A name that files in several folders share means
    none of them: these are found with their folders before it, as in Actor_01_clip.mp4. Of files that differ in the
    suffix alone, the stem means the one whose suffix comes first.
    """

    def __init__(self, folder: Path | None, suffixes: Sequence[str]):
        """Raises UserError when the folder cannot be listed; None has no files."""
        paths = list(_walk(folder, suffixes, frozenset())) if folder is not None else []
        paths.sort(key=lambda path: (path.parent, path.stem, -suffixes.index(path.suffix.lower())))
        self._folder, self._paths = folder, paths
        self._found: dict[str, Path] = {}
        for path in paths:
            whole = readable_name(path.relative_to(folder).as_posix())
            self._found |= dict.fromkeys((whole, _stem(whole), self._joined(path), _stem(self._joined(path))), path)
        for name_of in (lambda name: key_of(_stem(name)), _stem, str):
            self._add(lambda path, name_of=name_of: name_of(readable_name(path.name)))

    def _add(self, name_of: Callable[[Path], str]) -> None:
        """Add the names that mean files of one folder, of which the last counts."""
        folders: dict[str, set[Path]] = {}
        for path in self._paths:
            folders.setdefault(name_of(path), set()).add(path.parent)
        for path in self._paths:
            if path.parent == self._folder or len(folders[name_of(path)]) == 1:
                self._found[name_of(path)] = path

    def _joined(self, path: Path) -> str:
        return "_".join(map(readable_name, path.relative_to(self._folder).parts))

    def select(self, name: str) -> Path | None:
        """Return the file of a clip, None where there is none."""
        name = unicodedata.normalize("NFC", name)
        return self._found.get(name) or self._found.get(stem_of(name)) or self._found.get(key_of(name))

    def named(self) -> list[tuple[str, Path]]:
        """List the files, each with the name that is its own: the bare one, or that with its folders before it."""
        names = ((readable_name(path.name), path) for path in self._paths)
        return [(name if self._found.get(name) == path else self._joined(path), path) for name, path in names]


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def readable_name(name: str) -> str:
    """Return a file's name as text: bytes that are not UTF-8 are decoded (`decode_text`), and letters composed."""
    try:
        name.encode()
    except UnicodeEncodeError:
        name = decode_text(os.fsencode(name))
    return unicodedata.normalize("NFC", name)


def _walk(folder: Path, suffixes: Sequence[str], parents: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """Yield the files below a folder, without hidden folders, links to a folder above, and macOS's ._clip.mp4."""
    try:
        status = folder.stat()
        if (here := (status.st_dev, status.st_ino)) in parents:
            return
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot list the folder {folder} ({error.strerror}); check the path") from error
    for entry in found:
        if entry.name.startswith("._"):
            continue
        if os.path.splitext(entry.name)[1].lower() in suffixes and entry.is_file():
            yield folder / entry.name
        elif not entry.name.startswith(".") and entry.is_dir():
            yield from _walk(folder / entry.name, suffixes, parents | {here})


def find_below(folder: Path, path: str) -> Path | None:
    """The file of a path below a folder, or None; each of its names is found as `readable_name` has it."""
    try:
        if (found := folder / path).is_file():
            return found
        found = folder
        for part in PurePath(path).parts:
            if not (found / part).exists():
                part = next((name for name in os.listdir(found) if readable_name(name) == readable_name(part)), part)
            found /= part
        return found if found.is_file() else None
    except OSError:
        return None


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
