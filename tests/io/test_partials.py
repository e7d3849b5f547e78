"""Outputs that are being made: nobody touches those of the living, and the dead leave nothing for long."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from emollama_jax.io.atomic import atomic_file, atomic_folder, write_bytes, write_text
from emollama_jax.io.partials import partial_output

WRITERS = {
    "folder": lambda path: atomic_folder(path),
    "file": lambda path: atomic_file(path),
}
MODULES = {"open": os, "flock": fcntl}
KILLED = """
import os, sys
from emollama_jax.io.atomic import atomic_file, atomic_folder
with {"folder": atomic_folder, "file": atomic_file}[sys.argv[1]](sys.argv[2]) as partial:
    (partial / "weights" if partial.is_dir() else partial).write_text("half")
    os.kill(os.getpid(), 9)
"""


@pytest.mark.smoke
@pytest.mark.parametrize("kind", WRITERS)
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path, kind):
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", KILLED, kind, tmp_path / "out"], cwd=root)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and left.name.endswith(".partial")
    other = tmp_path / ".other.partial"  # of a preparation, which goes on there
    other.touch()
    with WRITERS[kind](tmp_path / "out") as partial:
        assert {path.name for path in tmp_path.iterdir()} == {partial.name, other.name}
    assert {path.name for path in tmp_path.iterdir()} == {"out", other.name}


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_another_writes_stays(tmp_path, is_folder):
    with partial_output(tmp_path, "out", is_folder=is_folder) as one:
        with partial_output(tmp_path, "out", is_folder=is_folder) as two:
            assert one.exists() and two.exists() and one != two
        assert one.exists() and not two.exists()
    assert not os.listdir(tmp_path)


def test_a_text_is_written_where_a_killed_writer_was(tmp_path):
    (tmp_path / ".[a].txt.01234567.partial").write_text("half")
    write_text(tmp_path / "[a].txt", "whole")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("[a].txt", "whole")]


def test_names_as_long_as_file_systems_take(tmp_path):
    path = tmp_path / ("中" * 83 + "ab.npy")  # 255 bytes
    write_bytes(path, b"whole")
    assert path.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("is_folder", [True, False])
@pytest.mark.parametrize("moment", ["open", "flock"])
def test_one_that_is_swept_away_before_it_is_locked_is_made_again(tmp_path, monkeypatch, is_folder, moment):
    real, swept = getattr(MODULES[moment], moment), []

    def sweep_first(*args, **kwargs):
        for path in [] if swept else list(tmp_path.iterdir()):
            swept.append(path)
            path.rmdir() if is_folder else path.unlink()
        return real(*args, **kwargs)

    monkeypatch.setattr(MODULES[moment], moment, sweep_first)
    with partial_output(tmp_path, "out", is_folder=is_folder) as partial:
        assert partial.exists() and partial not in swept
    assert swept and not os.listdir(tmp_path)


def test_one_that_another_writer_has_locked_to_remove_it_is_left_to_it(tmp_path, monkeypatch):
    real, held = fcntl.flock, []

    def hold_first(descriptor, how):
        if not held:
            (path,) = tmp_path.iterdir()
            held.append((path, os.open(path, os.O_RDONLY)))
            real(held[0][1], fcntl.LOCK_EX)
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", hold_first)
    with partial_output(tmp_path, "out", is_folder=False) as partial:
        assert partial != held[0][0]
    os.close(held[0][1])
