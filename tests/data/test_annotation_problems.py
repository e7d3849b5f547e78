"""What is said of annotations with problems: counts, lines of JSON, a summary."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from emollama_jax.data.annotations import read_annotations
from emollama_jax.data.problems import Problem
from emollama_jax.errors import UserError
from tests.data.annotation_samples import files_of, read, save, write


def test_strict_counts_the_problems_and_names_the_first(tmp_path):
    lists = write(tmp_path / "train.txt", "a sad\nb rage\n../c sad\n")
    first = f"2 problems with the data, the first: {lists}:2: 'rage' is none of happy, sad"
    with pytest.raises(UserError, match=re.escape(first)) as caught:
        read_annotations(files_of(lists), strict=True)
    assert "\n" not in str(caught.value)
    sound = files_of(write(lists, "a sad\n"))
    assert read_annotations(sound, strict=True) == read_annotations(sound)


def test_problems_as_json_lines(tmp_path):
    lists = write(tmp_path / "train.txt", b"a sad\n\xe4\xbd\xa0 rage\nb \xff\n\xff sad\n")
    found = read(lists)
    path = tmp_path / "new" / "problems.jsonl"
    for _ in range(2):  # the second replaces the first
        found.write_problems(path)
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert records == [json.loads(problem.to_json()) for problem in found.problems]
    assert [(record["kind"], record["name"], record["line"]) for record in records] == [
        ("unparsable_line", "b", 3),
        ("unparsable_line", "\udcff", 4),
        ("unknown_label", "你", 2),
    ]
    assert set(records[0]) == {field.name for field in dataclasses.fields(Problem)}
    assert all(record["message"] and record["file"] == str(lists) for record in records)
    assert "你" in path.read_text("utf-8")
    with pytest.raises(UserError, match="cannot write the output"):
        found.write_problems(tmp_path / "train.txt" / "problems.jsonl")


def test_summary(tmp_path):
    write(tmp_path / "video" / "a.mp4")
    features = tuple(save(tmp_path / kind / "a.npy").parent for kind in ("mae", "videomae", "hubert"))
    train = write(tmp_path / "train.csv", "name,emotion,subtitle\na,sad,Hi\nb,,\nc,rage,\n")
    test = write(tmp_path / "test.txt", "d happy\n")
    assert read(train, test, videos=tmp_path / "video", features=features).summary().splitlines() == [
        "clips: 3 (train 2, test 1)",
        "complete (label, video and all features): 1",
        "with: label 2, video 1, mae 1, videomae 1, hubert 1, subtitle 1",
        "problems: missing_video 2, missing_feature 6, unknown_label 1",
    ]
    assert read(write(test)).summary().splitlines()[0] == "clips: 0 (none)"
    assert read(write(test)).summary().splitlines()[-1] == "problems: none"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lists": (("train", Path("none.txt")),)}, "cannot read none.txt (No such file or directory)"),
        ({"coarse": Path("none.json")}, "cannot read none.json"),
        ({"subtitles": Path("none.csv")}, "cannot read none.csv"),
        ({"videos": Path("none")}, "cannot list the folder none (No such file or directory)"),
        ({"features": (None, None, Path("none"))}, "cannot list the folder none"),
        (
            {"lists": (("train", "emotion\nsad\n"),)},
            "no column name or names or video_name or video, it has 'emotion'",
        ),
        ({"lists": (("train", "\n"),)}, "is empty; begin with a header line"),
        ({"subtitles": "name,words\na,x\n"}, "no column subtitle or subtitles or sentence_en or english"),
        ({"fine": "[]"}, "is not a JSON object keyed by clip names"),
        ({"fine": '{"a": {}'}, "not JSON, or cut short"),
        ({"fine": "[" * 99999}, "not JSON, or cut short"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_files_of_no_use(tmp_path, changes, said):
    def made(value):
        return write(tmp_path / "file.csv", value) if isinstance(value, str) else value

    changes = {name: made(value) for name, value in changes.items()}
    if "lists" in changes:
        changes["lists"] = tuple((split, made(value)) for split, value in changes["lists"])
    whole = dataclasses.replace(files_of(write(tmp_path / "train.txt", "a sad")), **changes)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        read_annotations(whole)
    assert "\n" not in str(caught.value)
