"""Paths, local and in an object store; buckets themselves are in tests/train/test_bucket.py."""

import importlib.util
from pathlib import Path

import pytest

from emollama_jax.errors import UserError, first_line
from emollama_jax.io.paths import as_path, is_remote, local_copy


def test_local_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert str(as_path("a/b")) == str(tmp_path / "a/b")
    assert str(as_path(Path("~/b"))) == str(tmp_path / "home/b")
    assert str(as_path(as_path("/a"))) == "/a" and not is_remote(as_path("a"))


@pytest.mark.smoke
def test_addresses_stay_and_ask_for_what_reads_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    path = as_path("gs://bucket/run") / "file"
    assert str(path) == str(as_path(path)) == "gs://bucket/run/file" and is_remote(path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gs:// needs gcsfs: gs://bucket/run; pip install"):
        as_path("gs://bucket/run")


def test_a_local_path_is_its_own_copy(tmp_path):
    for name in (tmp_path, str(tmp_path / "file")):
        with local_copy(name) as copy:
            assert copy == Path(name) and isinstance(copy, Path)


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\n one  line \ntwo")) == "one line"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 999))) == 200
