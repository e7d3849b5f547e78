"""Outputs that are either complete or absent."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emollama_jax.errors import UserError


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside `path` that becomes `path` when the block ends well.

    When the block raises, the temporary folder is removed and nothing appears at `path`. Missing parents are made.

    Raises:
        UserError: `path` is a file or a folder that is not empty, or its parent cannot be written to.
    """
    target = Path(path).resolve()
    if target.exists() and not (target.is_dir() and next(target.iterdir(), None) is None):
        raise UserError(f"the output exists already: {path}; remove it or choose another folder")
    # A sibling, so that the final rename stays within one file system.
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"cannot write the output ({error.strerror}): {path}; choose another folder") from error
    try:
        yield partial
        try:
            os.replace(partial, target)
        except OSError as error:  # somebody filled `path` meanwhile
            raise UserError(
                f"cannot put the output in place ({error.strerror}): {path}; choose another folder"
            ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Give the path of a temporary file beside `path` that becomes `path` when the block ends well.

    Raises:
        UserError: `path` exists already, or its folder cannot be written to.
    """
    target = Path(path).resolve()
    if target.exists():
        raise UserError(f"the output exists already: {path}; remove it or choose another name")
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError as error:
        raise UserError(f"cannot write the output ({error.strerror}): {path}; choose another place") from error
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
