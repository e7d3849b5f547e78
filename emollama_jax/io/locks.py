"""Locks that keep two processes from writing one output."""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import IO

from emollama_jax.errors import UserError
from emollama_jax.io.paths import PathLike, as_path, is_remote


@contextlib.contextmanager
def exclusive_lock(path: PathLike, busy: Exception) -> Iterator[IO[str]]:
    """Holds an exclusive lock on a file, which is made where it is missing, until the block ends or the process dies.

    Args:
        path: in place of one in an object store, which has no locks, a temporary file of this machine is locked: other
            machines are not kept out.
        busy: is raised when another process holds the lock.

    Returns:
        The locked file, open for appending text. Writing to it does not release the lock; replacing it would.

    Raises:
        UserError: the file cannot be written.
    """
    file = lock_file(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("a+", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"cannot write the output ({error.strerror}): {path}; choose another place") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise busy from None
        yield lock


def lock_file(path: PathLike) -> pathlib.Path:
    """Returns the file that `exclusive_lock` locks for a path."""
    if not is_remote(path):
        return pathlib.Path(as_path(path))
    name = hashlib.sha256(os.fspath(as_path(path)).encode()).hexdigest()[:16]
    return pathlib.Path(tempfile.gettempdir()) / f"emollama-{os.getuid()}-{name}.lock"
