"""Places for outputs that are being made: named `.NAME.RANDOM.partial`, and locked for as long as their writer lives.

A writer removes its own on the way out. What one left that was killed is known by its lock, which the system has let
go, and is removed by the next process that writes in that folder.
"""

import contextlib
import fcntl
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

PATTERN = f".*.{'[0-9a-f]' * 8}.partial"

LONGEST = 200  # bytes of an output's name in that of its place: file systems take 255 in all

_swept: set[pathlib.Path] = set()


@contextlib.contextmanager
def partial_output(folder: pathlib.Path, name: str, *, is_folder: bool) -> Iterator[pathlib.Path]:
    """Gives a new empty file or folder in `folder`; what is still there at the end of the block is removed.

    Raises OSError where it cannot be made.
    """
    _sweep(folder, always=is_folder)
    name = os.fsdecode(os.fsencode(name)[:LONGEST])
    path, lock = _make_locked(folder, name, is_folder)
    try:
        yield path
    finally:
        _remove(path)
        os.close(lock)


def _sweep(folder: pathlib.Path, *, always: bool) -> None:
    """Removes what the dead left, once or always: folders fill with files that are written one by one."""
    if always or folder not in _swept:
        _swept.add(folder)
        for path in folder.glob(PATTERN):
            _remove_if_dead(path)


def _make_locked(folder: pathlib.Path, name: str, is_folder: bool) -> tuple[pathlib.Path, int]:
    """Makes the file or folder and returns its path and locked descriptor.

    A writer that sweeps may find it before it is locked, and remove it: then another one is made.
    """
    while True:
        path = folder / f".{name}.{uuid.uuid4().hex[:8]}.partial"
        if is_folder:
            path.mkdir()
        else:
            path.touch(exist_ok=False)
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY)
            if _lock(lock) and path.exists():
                return path, lock
            os.close(lock)


def _lock(descriptor: int) -> bool:
    """Locks a file; False where another one holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # file systems without locks; there nobody takes a writer for dead, either
        pass
    return True


def _remove_if_dead(path: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)
        finally:
            os.close(lock)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
