"""Outputs that are complete or absent."""

import json
import os
from types import SimpleNamespace

import pytest

from emollama_jax.errors import UserError
from emollama_jax.io.atomic import atomic_file, atomic_folder, write_json, write_text


def test_atomic_folder_appears_when_complete(tmp_path):
    target = tmp_path / "deep" / "out"
    with atomic_folder(target) as partial:
        (partial / "a").write_text("x")
        assert not target.exists() and partial.parent == target.parent
    assert [file.name for file in target.iterdir()] == ["a"]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_folder_leaves_nothing_after_a_failure(tmp_path, error):
    with pytest.raises(error):
        with atomic_folder(tmp_path / "out") as partial:
            (partial / "a").write_text("x")
            raise error
    assert list(tmp_path.iterdir()) == []


def test_atomic_folder_takes_an_empty_folder(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("x")
    assert (tmp_path / "out" / "a").read_text() == "x"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_atomic_folder_refuses_what_is_there(tmp_path, kind):
    target = tmp_path / "out"
    if kind == "folder":
        target.mkdir()
        (target / "keep").write_text("x")
    else:
        target.write_text("x")
    with pytest.raises(UserError, match="out.*remove it") as caught:
        with atomic_folder(target):
            raise AssertionError("never entered")
    assert "\n" not in str(caught.value)
    assert len(list(tmp_path.iterdir())) == 1


def test_atomic_folder_filled_meanwhile(tmp_path):
    with pytest.raises(UserError, match="out"):
        with atomic_folder(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").touch()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_atomic_folder_under_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="another folder"):
        with atomic_folder(tmp_path / "file" / "out"):
            pass


@pytest.mark.smoke
def test_atomic_file_appears_when_complete(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with atomic_file(tmp_path / "deep/out") as partial:
            raise KeyboardInterrupt
    assert list((tmp_path / "deep").iterdir()) == []
    with atomic_file(tmp_path / "deep/out") as partial:
        partial.write_text("x")
        assert not (tmp_path / "deep/out").exists()
    assert [(file.name, file.read_text()) for file in (tmp_path / "deep").iterdir()] == [("out", "x")]
    with pytest.raises(UserError, match="exists already"):
        with atomic_file(tmp_path / "deep/out"):
            raise AssertionError("never entered")


def test_a_text_takes_the_place_of_another_or_nothing_changes(tmp_path, monkeypatch):
    write_text(tmp_path / "deep/out", "one")
    write_json(tmp_path / "deep/out", {"name": "é\udc80"})
    assert json.loads((tmp_path / "deep/out").read_text(encoding="utf-8")) == {"name": "é\udc80"}

    def fail(descriptor):
        raise OSError("disk full")

    before = (tmp_path / "deep/out").read_bytes()
    monkeypatch.setattr("emollama_jax.io.atomic.os", SimpleNamespace(**{**vars(os), "fsync": fail}))
    with pytest.raises(OSError, match="disk full"):
        write_text(tmp_path / "deep/out", "two")
    assert [(file.name, file.read_bytes()) for file in (tmp_path / "deep").iterdir()] == [("out", before)]
