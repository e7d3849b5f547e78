"""Paths on this machine and in object stores (gs://BUCKET/FOLDER), used alike through epath.

Arguments are `PathLike`; inside, `as_path` makes them `epath.Path`, which has the methods of `pathlib.Path`. Never give
an address to `pathlib.Path`: it makes gs:/BUCKET of gs://BUCKET.
"""

import contextlib
import importlib.util
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath
from etils.epath import PathLike

from emollama_jax.errors import UserError
from emollama_jax.io.partials import partial_output

DOWNLOADS = 8  # at once


def is_remote(path: PathLike) -> bool:
    """Returns whether a path is in an object store."""
    return "://" in os.fspath(path)


def as_path(path: PathLike) -> epath.Path:
    """Returns an absolute path with `~` expanded; an address such as gs://BUCKET/FOLDER stays as it is.

    Raises:
        UserError: the address is in Google Cloud Storage and gcsfs is not installed.
    """
    if is_remote(path):
        if os.fspath(path).startswith("gs://") and not importlib.util.find_spec("gcsfs"):
            raise UserError(f"gs:// needs gcsfs: {os.fspath(path)}; pip install 'emollama_jax[gcs]'")
        return epath.Path(path)
    return epath.Path(path).expanduser().absolute()


def local_path(path: str) -> pathlib.Path:
    """Returns a path on this machine. Raises UserError for an address in an object store."""
    if is_remote(path):
        raise UserError(f"{path}: must be a path on this machine; copy what is in an object store here first")
    return pathlib.Path(path)


def is_file(path: PathLike) -> bool:
    """Returns whether there is a file.

    Raises:
        UserError: there is a link, but what it points to is gone, as in a download that was broken off.
    """
    path = as_path(path)
    if path.is_file():
        return True
    if not is_remote(path) and os.path.islink(path) and not os.path.exists(path):
        raise UserError(f"a link to a file that is gone, {os.readlink(path)}: {path}; download or copy it again")
    return False


def sizes_below(folder: PathLike) -> dict[str, int]:
    """Returns the bytes of every file below a folder, by its path from there; of an object store a listing says all."""
    folder = as_path(folder)
    if is_remote(folder):
        from fsspec.core import url_to_fs

        store, root = url_to_fs(os.fspath(folder))
        found = store.find(root, detail=True, update_cache=False)
        return {name.removeprefix(f"{root.rstrip('/')}/"): entry["size"] for name, entry in found.items()}
    paths = (pathlib.Path(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths if path.exists()}


@contextlib.contextmanager
def local_copy(path: PathLike, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[pathlib.Path]:
    """Gives a local path to a file or folder, for readers that need one, e.g. to map it into memory.

    A local path is given as it is. What is in an object store is downloaded below the folder for temporary files
    ($TMPDIR) and removed at the end of the block; a file that is mapped then stays readable, as its disk space is kept
    until it is unmapped. A `UserError` in the block that names the copy names `path` instead.

    Args:
        wanted: of a folder, which of the entries directly in it are downloaded, by their names.
    """
    source = as_path(path)
    if not is_remote(path):
        yield pathlib.Path(source)
        return
    with partial_output(pathlib.Path(tempfile.gettempdir()), source.name, is_folder=True) as folder:
        copy = folder / source.name
        _download(source, copy, wanted)
        try:
            yield copy
        except UserError as error:
            error.args = (str(error).replace(str(copy), str(path)),)
            raise


def _download(source: epath.Path, target: pathlib.Path, wanted: Callable[[str], bool]) -> None:
    if not source.is_dir():
        source.copy(target)
        return
    target.mkdir()
    entries = [entry for entry in source.iterdir() if wanted(entry.name)]
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        list(pool.map(lambda entry: _download(entry, target / entry.name, lambda name: True), entries))
