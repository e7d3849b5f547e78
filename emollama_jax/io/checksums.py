"""SHA-256 of files. A file is read once, unless it changes.

A process keeps the digests of all files; those of large ones are also kept for other processes, a line of JSON each, in
`~/.cache/emollama_jax/digests.jsonl`.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import threading
import time

from etils import epath

from emollama_jax.io.paths import PathLike, as_path, is_remote

CHUNK = 1 << 22  # bytes read at once
KEPT = pathlib.Path("~/.cache/emollama_jax/digests.jsonl")
KEPT_FROM = 1 << 26  # bytes; what is smaller is read faster than looked up
TICK_S = 0.02  # two writes within it may leave the same time on a file

_lock = threading.Lock()
_digests: dict[tuple, str] | None = None  # read when first used
_bytes_read = 0


def file_digest(path: PathLike, *, anew: bool = False) -> str:
    """Returns the SHA-256 of a file in hexadecimal.

    It is kept for as long as the file's size and time of change stay what they are; `anew` reads the file all the same,
    as a disk may lose bits without a change. Raises OSError where the file cannot be read.
    """
    global _bytes_read, _digests
    path = as_path(path)
    version, changed_s = _version(path)
    with _lock:
        if _digests is None:
            _digests = _read_kept()
        if not anew and (known := _digests.get(version)):
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
        if size >= KEPT_FROM:
            _keep(version, digest.hexdigest())
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


def _read_kept() -> dict[tuple, str]:
    """Reads what other processes kept; a line that was cut short is passed over."""
    kept: dict[tuple, str] = {}
    with contextlib.suppress(OSError):
        for line in KEPT.expanduser().read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                record = json.loads(line)
                kept[tuple(record["version"])] = record["sha256"]
    return kept


def _keep(version: tuple, digest: str) -> None:
    """Keeps a digest for other processes, where there is a place for it."""
    line = json.dumps({"version": version, "sha256": digest}) + "\n"
    with contextlib.suppress(OSError, UnicodeError):
        KEPT.expanduser().parent.mkdir(parents=True, exist_ok=True)
        with KEPT.expanduser().open("a", encoding="utf-8") as file:
            file.write(line)
