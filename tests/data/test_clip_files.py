"""The files of clips are found below their folder, however it is divided and however their names are written."""

import os
import unicodedata
from pathlib import Path

import pytest

from emollama_jax.data.annotation_files import AnnotationFiles
from emollama_jax.data.annotations import read_annotations
from emollama_jax.data.clip_files import FolderFiles, find_below, readable_name
from emollama_jax.media.container import VIDEO_SUFFIXES
from emollama_jax.text.labels import MERR

SUFFIXES = (".mp4", ".avi")


def folder_of(root: Path, *names: str | bytes) -> FolderFiles:
    for name in names:
        path = Path(os.fsdecode(os.path.join(os.fsencode(root), os.fsencode(name))))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return FolderFiles(root, SUFFIXES)


@pytest.mark.smoke
def test_folders_of_folders(tmp_path):
    files = folder_of(tmp_path, "Actor_01/03-01.mp4", "Actor_02/03-02.mp4", ".cache/x.mp4", "Actor_01/._03-01.mp4")
    assert [name for name, _ in files.named()] == ["03-01.mp4", "03-02.mp4"]
    found = tmp_path / "Actor_02/03-02.mp4"
    for name in ("03-02", "03-02.mp4", "Actor_02/03-02.mp4", "Actor_02/03-02", "Actor_02_03-02"):
        assert files.select(name) == found
    assert files.select("x") is None


def test_a_name_in_several_folders_means_none_of_them(tmp_path):
    files = folder_of(tmp_path, "a/1.mp4", "b/00001.mp4", "a/2.mp4", "b/2.mp4", "c/3.mp4", "3.mp4")
    assert files.select("2") is None and files.select("2.mp4") is None
    assert files.select("b_2") == tmp_path / "b/2.mp4" and files.select("b/2.mp4") == tmp_path / "b/2.mp4"
    assert files.select("1") == tmp_path / "a/1.mp4"
    assert files.select("3") == tmp_path / "3.mp4"  # the folder's own
    names = ["3.mp4", "1.mp4", "a_2.mp4", "00001.mp4", "b_2.mp4", "c_3.mp4"]
    assert [name for name, _ in files.named()] == names
    assert all(files.select(name) == path for name, path in files.named())


def test_a_folder_that_leads_back(tmp_path):
    files = folder_of(tmp_path, "a/1.mp4")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "a")
    assert [name for name, _ in files.named()] == ["1.mp4"]
    assert len(FolderFiles(tmp_path, SUFFIXES).named()) == 2  # by its folder and by the link to it


def test_names_that_are_no_unicode(tmp_path):
    files = folder_of(tmp_path, "中文.mp4".encode("gbk"), "b.mp4")
    assert [name for name, _ in files.named()] == ["b.mp4", "中文.mp4"]
    found = files.select("中文")
    assert found.is_file() and os.fsencode(found.name) == "中文.mp4".encode("gbk")
    assert readable_name("caf\udce9") == "café"


@pytest.mark.parametrize("written", ["NFC", "NFD"])
@pytest.mark.parametrize("there", ["NFC", "NFD"])
def test_letters_composed_and_not(tmp_path, written, there):
    files = folder_of(tmp_path, unicodedata.normalize(there, "é.mp4"))
    assert files.select(unicodedata.normalize(written, "é")).is_file()


@pytest.mark.parametrize("written", ["NFC", "NFD"])
@pytest.mark.parametrize("there", ["NFC", "NFD"])
def test_a_path_below_a_folder(tmp_path, written, there):
    folder_of(tmp_path, unicodedata.normalize(there, "é/é.mp4"))
    path = unicodedata.normalize(written, "é/é.mp4")
    assert find_below(tmp_path, path).is_file()
    assert find_below(tmp_path, "é.mp4") is find_below(tmp_path, "x" * 300) is find_below(tmp_path, path[:-1]) is None


def test_videos_of_every_container_are_found(tmp_path):
    names = ["a.MTS", "b.ts", "c.m2ts", "d.VOB", "e.m4v", "f.3gp", "g.wmv", "h.mpg", "i.flv"]
    folder_of(tmp_path, *names, "k.txt")
    assert [name for name, _ in FolderFiles(tmp_path, VIDEO_SUFFIXES).named()] == names


def test_every_video_of_a_folder_is_a_clip(tmp_path):
    folder_of(tmp_path, "a/x.mp4", "b/x.mp4", "b/y.mp4", "中.mp4".encode("gbk"))
    found = read_annotations(AnnotationFiles(lists=(), videos=tmp_path, labels=MERR))
    assert found.problems == ()
    assert [(clip.name, os.fsencode(clip.video)[len(os.fsencode(tmp_path)) + 1 :]) for clip in found.clips] == [
        ("中", "中.mp4".encode("gbk")),
        ("a_x", b"a/x.mp4"),
        ("b_x", b"b/x.mp4"),
        ("y", b"b/y.mp4"),
    ]
