"""What is asked about: each clip once, whatever the manifest calls it."""

import json
from pathlib import Path

import pytest

from emollama_jax.infer.inputs import find_items


def items_of(path: Path, content: str) -> list[tuple[str, str | None, str]]:
    path.write_text(content)
    return [(item.name, item.video and item.video.name, item.fault) for item in find_items(path)]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("m.csv", "name\n1\n00001\n00001.mp4\n"),
        ("m.txt", "1\n00001\n00001.mp4\n"),
        ("m.tsv", "name\tsubtitle\n1\t\n00001\tx\n00001.mp4\ty\n"),
        ("m.jsonl", "\n".join(json.dumps({"name": name}) for name in ("1", "00001", "00001.mp4"))),
    ],
)
def test_names_of_one_clip_are_asked_once(tmp_path, file, content):
    (tmp_path / "00001.mp4").touch()
    first, *others = items_of(tmp_path / file, content)
    assert first == ("1", "00001.mp4", "")
    assert len({name for name, _, _ in others}) == 2
    for (name, _, fault), written in zip(others, ("00001", "00001.mp4"), strict=True):
        assert name.startswith(f"{file}:")
        assert f"{written!r} is the clip '1', which is listed before" in fault


def test_a_plain_list_of_videos(tmp_path):
    for name in ("ok.mp4", "sub/my clip.mov"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert items_of(tmp_path / "list.txt", "ok.mp4\nsub/my clip.mov\n") == [
        ("ok.mp4", "ok.mp4", ""),
        ("sub/my clip.mov", "my clip.mov", ""),
    ]


def test_what_is_missing_is_not_asked(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "m.jsonl").write_text('{"name": "a", "subtitle": NaN, "question": NaN}')
    (item,) = find_items(tmp_path / "m.jsonl")
    assert (item.subtitle, item.question) == ("", "")


@pytest.mark.smoke
def test_a_folder_of_folders(tmp_path):
    for name in ("Actor_01/x.mp4", "Actor_02/x.mp4", "Actor_02/y.mp4", "7.mp4", "007.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [(item.name, bool(item.fault)) for item in find_items(tmp_path)]
    assert found == [
        ("007.mp4", False),
        (str(tmp_path / "7.mp4"), True),
        ("Actor_01_x.mp4", False),
        ("Actor_02_x.mp4", False),
        ("y.mp4", False),
    ]
