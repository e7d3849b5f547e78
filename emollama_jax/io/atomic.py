"""Outputs that are either complete or absent, on this machine and in object stores."""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from emollama_jax.errors import UserError
from emollama_jax.io.partials import partial_output
from emollama_jax.io.paths import PathLike, as_path, is_remote


@contextlib.contextmanager
def atomic_folder(path: PathLike) -> Iterator[pathlib.Path]:
    """Gives a temporary local folder that becomes `path` when the block ends without an error.

    After an error the temporary folder is removed and nothing appears at `path`. Missing parents are made. In an object
    store files appear one by one, in the order they were last written in: write a manifest last.

    Raises:
        UserError: `path` is a file or a folder that is not empty, or its parent cannot be written to.
    """
    target = as_path(path)
    if target.exists() and not (target.is_dir() and next(iter(target.iterdir()), None) is None):
        raise UserError(f"the output exists already: {path}; remove it or choose another folder")
    with _partial(path, is_folder=True) as partial:
        yield partial
        if is_remote(path):
            _upload(partial, path)
            return
        try:
            os.replace(partial, _resolved(path))
        except OSError as error:  # something else was put at `path` meanwhile
            raise UserError(
                f"cannot put the output in place ({error.strerror}): {path}; choose another folder"
            ) from error


@contextlib.contextmanager
def atomic_file(path: PathLike) -> Iterator[pathlib.Path]:
    """Gives the path of a temporary local file that becomes `path` when the block ends without an error.

    Raises:
        UserError: `path` exists already, or its folder cannot be written to.
    """
    if as_path(path).exists():
        raise UserError(f"the output exists already: {path}; remove it or choose another name")
    with _partial(path, is_folder=False) as partial:
        yield partial
        if is_remote(path):
            as_path(partial).copy(as_path(path))
        else:
            os.replace(partial, _resolved(path))


def write_bytes(path: PathLike, data: bytes) -> None:
    """Writes a file, in place of one that is there; on a local disk it is durable when this returns."""
    if is_remote(path):
        as_path(path).write_bytes(data)  # an object appears whole
        return
    with _partial(path, is_folder=False) as partial:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, _resolved(path))


def write_text(path: PathLike, text: str) -> None:
    """Writes a file in UTF-8, as `write_bytes` does; characters that UTF-8 does not have become backslash escapes."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: PathLike, value: Any) -> None:
    """Writes a value as an indented JSON file, as `write_bytes` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _partial(path: PathLike, *, is_folder: bool) -> Iterator[pathlib.Path]:
    """Gives an empty file or folder in which an output can be made before it is put in place.

    Of a local output it is beside it, so that the final rename stays within one file system.
    """
    if is_remote(path):
        with partial_output(pathlib.Path(tempfile.gettempdir()), as_path(path).name, is_folder=is_folder) as partial:
            yield partial
        return
    target = _resolved(path)
    with contextlib.ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(partial_output(target.parent, target.name, is_folder=is_folder))
        except OSError as error:
            place = "folder" if is_folder else "place"
            raise UserError(f"cannot write the output ({error.strerror}): {path}; choose another {place}") from error
        yield partial


def _resolved(path: PathLike) -> pathlib.Path:
    return pathlib.Path(as_path(path)).resolve()


def _upload(folder: pathlib.Path, target: PathLike) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    try:
        for file in sorted(files, key=lambda file: file.stat().st_mtime_ns):
            as_path(file).copy(as_path(target) / file.relative_to(folder).as_posix())
    except BaseException:
        as_path(target).rmtree(missing_ok=True)
        raise
