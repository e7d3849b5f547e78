"""SHA-256 of files. A process reads a file once, unless it changes."""

import hashlib
import os
import threading
import time

from etils import epath

from emollama_jax.io.paths import PathLike, as_path, is_remote

CHUNK = 1 << 22  # bytes read at once
TICK_S = 0.02  # two writes within it may leave the same time on a file

_lock = threading.Lock()
_digests: dict[tuple, str] = {}
_bytes_read = 0


def file_digest(path: PathLike) -> str:
    """Returns the SHA-256 of a file in hexadecimal.

    It is kept for as long as the file's size and time of change stay what they are. Raises OSError where the file
    cannot be read.
    """
    global _bytes_read
    path = as_path(path)
    version, changed_s = _version(path)
    with _lock:
        if known := _digests.get(version):
            return known
    # A file that has only just been written could change once more without a new time.
    time.sleep(min(max(0.0, changed_s + TICK_S - time.time()), TICK_S))
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    with _lock:
        _bytes_read += size
        _digests[version] = digest.hexdigest()
    return digest.hexdigest()


def bytes_read() -> int:
    """Returns how many bytes `file_digest` has read in this process."""
    return _bytes_read


def _version(path: epath.Path) -> tuple[tuple, float]:
    """What tells one content of a path from another, and the time of its last change in seconds."""
    if is_remote(path):
        found = path.stat()
        return (str(path), found.length, found.mtime), found.mtime
    found = os.stat(path)
    return (str(path), found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns), found.st_ctime
