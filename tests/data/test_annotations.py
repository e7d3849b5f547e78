"""Annotations of every kind of file, sound and damaged; what is wrong is named by clip, file and line."""

import collections
import dataclasses
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from emollama_jax.data.annotation_files import AnnotationFiles, find_annotation_files
from emollama_jax.data.annotations import Annotations, Clip, read_annotations
from emollama_jax.data.clip_files import read_feature
from emollama_jax.data.problems import Problem
from emollama_jax.errors import UserError
from emollama_jax.text import labels
from emollama_jax.text.labels import ALIASES

ONES = np.ones(1024, np.float32)


def write(path: Path, content: str | bytes = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def save(path: Path, array=ONES, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array, **options)
    return path


def files_of(*lists: Path, labels: tuple[str, ...] = labels.MERR, **others) -> AnnotationFiles:
    return AnnotationFiles(lists=tuple((path.stem, path) for path in lists), labels=labels, **others)


def read(*lists: Path, **others) -> Annotations:
    return read_annotations(files_of(*lists, **others))


def told(annotations: Annotations) -> list[tuple[str, str | None, int | None]]:
    return [(problem.kind, problem.name, problem.line) for problem in annotations.problems]


def names(annotations: Annotations) -> list[str]:
    return [clip.name for clip in annotations.clips]


# -- lists and tables


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("space", [" ", "\t", "  \t "], ids=["space", "tab", "mixed"])
def test_lists(tmp_path, bom, end, space):
    lines = ["a happy", "", "b 35 sad", "   ", "c 12 Angry -1.5"]
    text = end.join(line.replace(" ", space) for line in lines)
    found = read(write(tmp_path / "train.txt", bom + text.encode()))
    assert found.problems == ()
    assert found.clips == (
        Clip(name="a", split="train", emotion="happy"),
        Clip(name="b", split="train", emotion="sad", frame_count=35),
        Clip(name="c", split="train", emotion="angry", frame_count=12, valence=-1.5),
    )


FULL = {
    "name": "clip 1",
    "emotion": "sad",
    "valence": "-0.1",
    "subtitle": 'Well, "no"',
    "caption_coarse": "two\nlines",
    "caption_fine": "很难过\u2028",
    "peak_index": "12",
    "split": "test",
}
CLIP = Clip(
    name="clip 1",
    split="test",
    emotion="sad",
    valence=-0.1,
    subtitle='Well, "no"',
    caption_coarse="two\nlines",
    caption_fine="很难过",
    peak_index=12,
)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_own_csv(tmp_path, bom, end):
    quoted = ['"' + value.replace('"', '""') + '"' for value in FULL.values()]
    text = end.join([" , ".join(FULL).upper(), ",".join(quoted), "b" + "," * 7, "," * 7, "c,happy,,,,,3.0,"])
    found = read(write(tmp_path / "train.csv", bom + text.encode()))
    others = Clip(name="b", split="train"), Clip(name="c", split="train", emotion="happy", peak_index=3)
    assert found == Annotations((CLIP, *others), ())


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_own_jsonl(tmp_path, end):
    whole = {**FULL, "valence": -0.1, "peak_index": 12, "colour": ["unused"]}
    records = [whole, {"name": 7, "emotion": None, "subtitle": ""}]
    text = end.join(["", *(json.dumps(record, ensure_ascii=False) for record in records)])
    found = read(write(tmp_path / "train.jsonl", "\ufeff" + text))
    assert found == Annotations((CLIP, Clip(name="7", split="train")), ())


def test_tables_of_mer(tmp_path):
    found = read(write(tmp_path / "train.csv", "name,discrete,valence\na,worried,-1.7\nb,HAPPY ,\n"))
    assert [(clip.name, clip.emotion, clip.valence) for clip in found.clips] == [
        ("a", "worried", -1.7),
        ("b", "happy", None),
    ]


def test_the_answers_of_emer_are_captions(tmp_path):
    found = read(write(tmp_path / "test.csv", "names,chi_reasons,eng_reasons\na,他笑,He smiles\nb,她哭,\n"))
    assert [(clip.name, clip.caption_fine, clip.subtitle) for clip in found.clips] == [
        ("a", "He smiles", ""),
        ("b", "她哭", ""),
    ]


def test_digits_of_dfew(tmp_path):
    rows = "".join(f"{number},{number}\n" for number in range(1, 8))
    table = write(tmp_path / "train.csv", f"video_name,label\n{rows}")
    for number, written in enumerate(("00001.mp4", "2.mp4", "003.avi", "00004.MP4"), 1):
        write(tmp_path / "video" / written)
        save(tmp_path / "mae" / f"{number:05}.npy")
    others = {"videos": tmp_path / "video", "features": (tmp_path / "mae", None, None)}
    found = read(table, labels=labels.DFEW, first_number=1, **others)
    assert tuple(clip.emotion for clip in found.clips) == labels.DFEW
    assert names(found) == [str(number) for number in range(1, 8)]
    videos = [clip.video and clip.video.name for clip in found.clips]
    assert videos == ["00001.mp4", "2.mp4", "003.avi", "00004.MP4", None, None, None]
    assert [clip.has_feature for clip in found.clips] == [(True, False, False)] * 4 + [(False, False, False)] * 3
    assert told(found) == [
        (kind, str(number), number + 1) for number in (5, 6, 7) for kind in ("missing_video", "missing_feature")
    ]


@pytest.mark.parametrize("written", ["00012", "12"])
def test_the_exact_name_goes_before_the_padded_one(tmp_path, written):
    for name in ("00012.mp4", "12.mp4"):
        write(tmp_path / "video" / name)
    clip = read(write(tmp_path / "train.txt", f"{written} sad"), videos=tmp_path / "video").clips[0]
    assert clip.video == tmp_path / "video" / f"{written}.mp4"


@pytest.mark.parametrize("written", [*ALIASES, "HAPPY", "Sad"])
def test_labels_by_other_names(tmp_path, written):
    every = tuple(dict.fromkeys((*labels.MERR, *labels.DFEW)))
    found = read(write(tmp_path / "train.csv", f"name,emotion\na, {written.title()} \n"), labels=every)
    assert found.problems == ()
    assert found.clips[0].emotion == ALIASES.get(written, written.lower())


def test_a_label_set_may_have_the_other_names(tmp_path):
    table = write(tmp_path / "train.txt", "a angry\nb Anger\nc rage\n")
    found = read(table, labels=("anger", "joy"))
    assert [clip.emotion for clip in found.clips] == ["anger", "anger"]
    assert told(found) == [("unknown_label", "c", 3)]
    assert [clip.emotion for clip in read(table, labels=()).clips] == ["angry", "anger", "rage"]


# -- subtitles and captions


@pytest.mark.parametrize(
    ("header", "row", "said"),
    [
        ("name,sentence", "a,hello", "hello"),
        ("name,sentence,sentence_en", "a,你好,hello", "hello"),
        ("name,chinese,english", "a,你好,hello", "hello"),
        (",name,sentence", '0,a.mp4,"oh, no"', "oh, no"),
        ("name,sentence", "a,", ""),
    ],
)
def test_subtitles(tmp_path, header, row, said):
    subtitles = write(tmp_path / "subtitles.csv", f"\ufeff{header}\r\n{row}\r\n")
    found = read(write(tmp_path / "train.txt", "a sad\n"), subtitles=subtitles)
    assert found == Annotations((Clip(name="a", split="train", emotion="sad", subtitle=said),), ())


def entry(**fields) -> dict:
    whole = {"AU_list": ["AU05"], "visual_prior_list": [], "audio_prior_list": "calm", "peak_AU_list": {"AU05": 1.2}}
    return {**whole, "peak_index": 7, "text": "from MERR", "pseu_emotion": "fear", **fields}


def test_captions_of_merr(tmp_path):
    coarse = {"a": entry(caption="coarse a"), "b": entry(caption="coarse b", peak_index=None)}
    fine = {"a": entry(caption="other", smp_reason_caption="fine a", peak_index=9)}
    found = read(
        write(tmp_path / "train.txt", "a sad\nb happy\n"),
        coarse=write(tmp_path / "coarse.json", json.dumps(coarse)),
        fine=write(tmp_path / "fine.json", "\ufeff" + json.dumps(fine)),
        subtitles=write(tmp_path / "subtitles.csv", "name,sentence\nb,from CSV\n"),
    )
    assert found.problems == ()
    a, b = found.clips
    assert (a.emotion, a.caption_coarse, a.caption_fine, a.peak_index) == ("sad", "coarse a", "fine a", 7)
    assert (b.emotion, b.caption_coarse, b.caption_fine, b.peak_index) == ("happy", "coarse b", "", None)
    assert (a.subtitle, b.subtitle) == ("from MERR", "from CSV")


def test_repeated_keys_of_merr(tmp_path):
    text = '{"a": {"caption": "first", "caption": "second"}, "b": {"caption": "first"}, "b": {"caption": "second"}}'
    found = read(write(tmp_path / "train.txt", "a sad\nb sad\n"), coarse=write(tmp_path / "coarse.json", text))
    assert told(found) == [("duplicate_key", "b", None), ("duplicate_key", "a", None)]
    assert "'b'" in found.problems[0].message and "'caption'" in found.problems[1].message
    assert [clip.caption_coarse for clip in found.clips] == ["first", "first"]


def test_entries_of_merr_that_cannot_be_used(tmp_path):
    coarse = {
        "a": ["caption"],
        "b": entry(caption={"no": "text"}),
        "c": entry(peak_index="soon"),
        "d": entry(caption="x"),
    }
    found = read(
        write(tmp_path / "train.txt", "a sad\nb sad\nc sad\nd sad\n"),
        coarse=write(tmp_path / "coarse.json", json.dumps(coarse)),
    )
    assert names(found) == ["a", "b", "c", "d"]
    assert told(found) == [
        *(("unparsable_caption", name, None) for name in "abc"),
        *(("missing_caption", name, line) for line, name in enumerate("abc", 1)),
    ]


# -- what is wrong


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("train.txt", "a sad\nb\nc 3 sad 0.5 more\nd x sad\ne 3 sad much\nf 3 sad inf\n", "b2 c3 d4 e5 f6"),
        ("train.txt", "a sad\nb 很难过很难过".encode() + b"\xff\n", "b2"),
        ("train.csv", "name,valence,peak_index\na,,\nb,high,\nc,inf,\nd,,-1\ne,,2.5\nf,1\n", "b3 c4 d5 e6 f7"),
        ("train.csv", 'name,subtitle\na,x\nb,oh, no\n"c"d,x\n', "b3 None4"),
        ("train.csv", 'name,subtitle\na,x\nb,"never closed\nc,x\n', "None3"),
        ("train.csv", "name,subtitle\na,很难过很难过\nb,caf".encode() + b"\xe9\n", "b3"),
        ("train.jsonl", '{"name": "a"}\n{"name": "b", "valence": "x"}\n[1]\n{"name":\n', "b2 None3 None4"),
        ("train.jsonl", '{"name": "b", "subtitle": ["x"]}\n{"name": "a"}\n{"name": "c", "emotion": true}', "b1 c3"),
        ("train.jsonl", '{"name": "b", "subtitle": "\\ud83d"}\n{"name": "a"}\n' + "[" * 99999, "b1 None3"),
        ("train.csv", "name,split\na,dev-2\nb,../x\n", "b3"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("train") else "",
)
def test_unparsable_lines(tmp_path, file, content, expected):
    found = read(write(tmp_path / file, content))
    assert names(found) == ["a"]
    assert {problem.kind for problem in found.problems} == {"unparsable_line"}
    assert " ".join(f"{problem.name}{problem.line}" for problem in found.problems) == expected
    assert {problem.file for problem in found.problems} == {str(tmp_path / file)}


def test_lines_inside_of_quotes_are_counted(tmp_path):
    found = read(write(tmp_path / "train.csv", 'name,subtitle,emotion\na,"x\r\ny\r\nz",sad\r\nb,,rage\r\n'))
    assert told(found) == [("unknown_label", "b", 5)]


UNSAFE = ["../x", "..", ".", "/etc/passwd", "a/b", "a\\b", "C:x", "nul\0", "bell\a", "", "...mp4", "a/../../x"]


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_names(tmp_path, name):
    for place in ("x", "data/x", "data/b"):
        write(tmp_path / f"{place}.mp4")
        save(tmp_path / f"{place}.npy")
    table = write(tmp_path / "train.jsonl", json.dumps({"name": name, "emotion": "sad"}) + '\n{"name": "b"}')
    data = tmp_path / "data"
    found = read(table, videos=data, features=(data, data, data))
    assert names(found) == ["b"]
    assert told(found) == [("unsafe_name", name, 1)]
    assert "\n" not in found.problems[0].message and "\0" not in found.problems[0].message


@pytest.mark.parametrize("video", ["../b.mp4", "/b.mp4", "a/../../b.mp4", "a\\..\\b.mp4", "a//b.mp4", "C:b.mp4"])
def test_unsafe_videos(tmp_path, video):
    write(tmp_path / "b.mp4")
    found = read(write(tmp_path / "data" / "train.jsonl", json.dumps({"name": "a", "video": video})))
    assert found.clips == ()
    assert told(found) == [("unsafe_name", "a", 1)]


@pytest.mark.parametrize("folder", [None, "elsewhere"])
def test_videos_named_in_a_table(tmp_path, folder):
    table = write(tmp_path / "train.csv", "name,video\na,sub/x.mp4\nb,gone.mp4\n")
    base = tmp_path / (folder or "")
    video = write(base / "sub/x.mp4")
    found = read(table, videos=folder and base)
    assert [clip.video for clip in found.clips] == [video, None]
    assert told(found) == [("missing_video", "b", 3)]


@pytest.mark.parametrize(
    ("written", "there", "chosen"),
    [
        ("a", ["a.avi", "a.mp4"], "a.mp4"),
        ("a", ["a.avi"], "a.avi"),
        ("a.avi", ["a.avi", "a.mp4"], "a.avi"),
        ("a.avi", ["a.mp4"], "a.mp4"),
        ("a.b", ["a.b.mp4", "a.mp4"], "a.b.mp4"),
        ("a", ["a.txt"], None),
        ("A", ["a.mp4"], None),
    ],
)
def test_videos_in_a_folder(tmp_path, written, there, chosen):
    for name in there:
        write(tmp_path / "video" / name)
    (tmp_path / "video" / "folder.mp4").mkdir()
    found = read(write(tmp_path / "train.txt", f"{written} sad\nfolder sad"), videos=tmp_path / "video")
    assert found.clips[0].name == written.removesuffix(".avi")
    assert [clip.video and clip.video.name for clip in found.clips] == [chosen, None]
    assert told(found) == [("missing_video", written, 1), ("missing_video", "folder", 2)][chosen is not None :]


def test_names_listed_twice(tmp_path):
    train = write(tmp_path / "train.txt", "a sad\nb sad\na sad\na.mp4 happy\n7 sad\n00007 sad\n")
    test = write(tmp_path / "test.csv", "name,emotion\nc,sad\nb,sad\n")
    found = read(train, test)
    assert [(clip.name, clip.split) for clip in found.clips] == [(n, "train") for n in "ab7"] + [("c", "test")]
    repeated = [("a", 3), ("a.mp4", 4), ("00007", 6), ("b", 3)]
    assert told(found) == [("duplicate_name", name, line) for name, line in repeated]
    assert [problem.file for problem in found.problems] == [str(train)] * 3 + [str(test)]
    assert f"{train}:2" in found.problems[-1].message

    overlapping = read(train, test, overlap=True)
    assert told(overlapping) == told(found)[:3]
    assert [(clip.name, clip.split) for clip in overlapping.clips][-2:] == [("c", "test"), ("b", "test")]


def test_a_line_put_aside_does_not_use_up_its_name(tmp_path):
    found = read(write(tmp_path / "train.txt", "a rage\na sad\n"))
    assert [clip.emotion for clip in found.clips] == ["sad"]
    assert told(found) == [("unknown_label", "a", 1)]


def test_what_is_missing(tmp_path):
    for folder in ("video", "mae", "videomae", "hubert"):
        suffix = "mp4" if folder == "video" else "npy"
        content = b"" if folder == "video" else save(tmp_path / "one.npy").read_bytes()
        write(tmp_path / folder / f"a.{suffix}", content)
    everything = files_of(
        write(tmp_path / "train.txt", "a sad\nb happy\n"),
        coarse=write(tmp_path / "coarse.json", json.dumps({"a": {"caption": "x"}})),
        fine=write(tmp_path / "fine.json", "{}"),
        subtitles=write(tmp_path / "subtitles.csv", "name,sentence\na,Hi\n"),
        videos=tmp_path / "video",
        features=(tmp_path / "mae", tmp_path / "videomae", tmp_path / "hubert"),
    )
    found = read_annotations(everything)
    assert names(found) == ["a", "b"]
    kinds = ["missing_video", *["missing_feature"] * 3, "missing_subtitle", "missing_caption"]
    assert told(found) == [(kind, "b", 2) for kind in kinds]
    named = [" mae ", " videomae ", " hubert "]
    assert [name in problem.message for name, problem in zip(named, found.problems[1:4], strict=True)] == [True] * 3
    nothing = files_of(*(path for _, path in everything.lists))
    assert read_annotations(nothing).problems == ()


def test_repeated_subtitles_and_keys_of_jsonl(tmp_path):
    found = read(
        write(tmp_path / "train.jsonl", '{"name": "a", "emotion": "sad", "emotion": "happy"}'),
        subtitles=write(tmp_path / "subtitles.csv", "name,sentence\na,first\na,second\n"),
    )
    assert told(found) == [("duplicate_key", "a", 3), ("duplicate_key", "a", 1)]
    assert (found.clips[0].emotion, found.clips[0].subtitle) == ("sad", "first")


# -- features


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


BROKEN = {
    "wrong_shape": [np.ones(1023), np.ones((2, 3, 1024)), np.ones((1024, 1)), np.ones((0, 1024)), np.float32(1)],
    "not_finite": [ONES * np.nan, ONES * np.inf, ONES.astype(np.float64) * 1e300],
    "unreadable_feature": [ONES.astype(complex), ONES.astype(str), ONES > 0, np.zeros(1024, [("x", "f4")])],
}


@pytest.mark.parametrize(("kind", "array"), [(kind, array) for kind, arrays in BROKEN.items() for array in arrays])
@pytest.mark.parametrize("which", [0, 2])
def test_broken_features(tmp_path, kind, array, which):
    for folder in ("0", "1", "2"):
        save(tmp_path / folder / "a.npy")
        broken = save(tmp_path / folder / "b.npy", array if folder == str(which) else ONES)
    broken = tmp_path / str(which) / "b.npy"
    folders = (tmp_path / "0", tmp_path / "1", tmp_path / "2")
    lists = write(tmp_path / "train.txt", "a sad\nb sad\n")
    found = read(lists, features=folders)
    assert told(found) == [(kind, "b", None)]
    assert found.problems[0].file == str(broken)
    assert found.clips[0].has_feature == (True, True, True)
    assert found.clips[1].has_feature == tuple(i != which for i in range(3))
    with pytest.raises(UserError, match=re.escape(f"{broken}: {found.problems[0].message}")):
        read_feature(broken)
    unchecked = read_annotations(files_of(lists, features=folders), check_features=False)
    assert unchecked.problems == () and unchecked.clips[1].has_feature == (True, True, True)


def test_pickles_are_never_read(tmp_path):
    made = tmp_path / "made"
    payload = np.full(1024, Touch(made), object)
    save(tmp_path / "mae" / "a.npy", payload, allow_pickle=True)
    save(tmp_path / "mae" / "b.npy", np.zeros(1024, [("x", "O")]), allow_pickle=True)
    write(tmp_path / "mae" / "c.npy", pickle.dumps(Touch(made)))
    lists = write(tmp_path / "train.txt", "a sad\nb sad\nc sad\n")
    found = read(lists, features=(tmp_path / "mae", None, None))
    assert told(found) == [("object_dtype", "a", None), ("object_dtype", "b", None), ("unreadable_feature", "c", None)]
    assert [clip.features for clip in found.clips] == [(None, None, None)] * 3
    assert not made.exists()
    np.load(tmp_path / "mae" / "a.npy", allow_pickle=True)
    assert made.exists()  # so the payload does work


def cut(content: bytes) -> bytes:
    return content[:-1]


def header_only(content: bytes) -> bytes:
    return content[:128].replace(b"(1024,), }", b"(1000000000000, 1024), }")


@pytest.mark.parametrize(
    "damage", [cut, header_only, lambda content: b"", lambda content: content[:20], bytes.swapcase]
)
def test_damaged_features(tmp_path, damage):
    content = damage(save(tmp_path / "sound.npy").read_bytes())
    path = write(tmp_path / "mae" / "a.npy", content)
    found = read(write(tmp_path / "train.txt", "a sad"), features=(path.parent, None, None))
    assert told(found) == [("unreadable_feature", "a", None)]
    assert "\n" not in found.problems[0].message


@pytest.mark.parametrize("dtype", ["f2", "f4", ">f4", "f8", "i2"])
@pytest.mark.parametrize("shape", [(1024,), (1, 1024), (7, 1024)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_features(tmp_path, dtype, shape, order):
    array = np.random.default_rng(0).normal(size=shape, scale=9).astype(dtype, order=order)
    feature = read_feature(save(tmp_path / "a.npy", array))
    assert feature.shape == (1024,) and feature.dtype == np.float32
    np.testing.assert_allclose(feature, array.astype(np.float64).reshape(-1, 1024).mean(0), rtol=1e-6, atol=1e-6)
    if array.size == 1024:
        np.testing.assert_array_equal(feature, array.reshape(1024).astype(np.float32))


def test_a_feature_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"a\.npy: cannot be read \(No such file or directory\); extract"):
        read_feature(tmp_path / "a.npy")


def test_features_with_newer_headers(tmp_path):
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, ONES, version=(2, 0))
    np.testing.assert_array_equal(read_feature(path), ONES)


# -- the report


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


# -- usual names


def tree(root: Path, files: dict[str, str], clips: str, features: tuple[str, ...], video: str = "video") -> None:
    for name, content in files.items():
        write(root / name, content)
    for clip in clips.split():
        write(root / video / f"{clip}.mp4")
        for folder in features:
            save(root / folder / f"{clip}.npy")


USUAL = ("mae_340_UTT", "maeV_399_UTT", "HL-UTT")


@pytest.mark.smoke
def test_a_sound_merr(tmp_path):
    files = {
        "MERR_coarse_grained.txt": "a happy\nb 5 fear\n",
        "MERR_fine_grained.txt": "b fear\nc neutral\n",
        "MERR_coarse_grained.json": json.dumps({name: entry(caption=f"coarse {name}") for name in "ab"}),
        "MERR_fine_grained.json": json.dumps({name: entry(smp_reason_caption=f"fine {name}") for name in "bc"}),
        "transcription_all.csv": "name,sentence\na,你\nb,你\nc,你\n",
        "transcription_en_all.csv": "name,sentence\na,A\nb,B\nc,C\n",
    }
    tree(tmp_path, files, "a b c", USUAL)
    found = read_annotations(find_annotation_files("merr", tmp_path), strict=True)
    assert found.problems == ()
    shown = [(c.split, c.name, c.emotion, c.subtitle, c.caption_coarse, c.caption_fine) for c in found.clips]
    assert shown == [
        ("coarse", "a", "happy", "A", "coarse a", ""),
        ("coarse", "b", "fear", "B", "coarse b", "fine b"),
        ("fine", "b", "fear", "B", "coarse b", "fine b"),
        ("fine", "c", "neutral", "C", "", "fine c"),
    ]
    assert all(c.video == tmp_path / f"video/{c.name}.mp4" and c.peak_index == 7 for c in found.clips)
    assert found.clips[0].features == tuple(tmp_path / folder / "a.npy" for folder in USUAL)


MER = {
    "relative_train_NCEV.txt": "a 3 happy 1.5\n",
    "relative_test1_NCEV.txt": "b 3 sad -1\n",
    "relative_test3_NCEV.txt": "c 3 worried\n",
    "train-label.csv": "name,discrete,valence\na,happy,1.5\n",  # the same again: left alone
}
MER_CSV = {
    "train-label.csv": "name,discrete,valence\na,happy,1.5\n",
    "test-labels/test1-label.csv": "name,discrete,valence\nb,sad,-1\n",
    "test3-label.csv": "name,discrete\nc,worried\n",
}


def test_an_export_of_mer_factory(tmp_path):
    """Three columns, labels outside MERR's, peaks as texts from 1, empty lists, a tone that is a text, no words in the
    fine file: each is mended, or put aside with its name."""
    write(tmp_path / "MERR_coarse_grained.txt", "a 75 happy\nb 60 unknown\nc 50 disgust\nd 40 surprise\n")
    write(tmp_path / "MERR_fine_grained.txt", "a 75 happy\n")
    entry = {
        "AU_list": [],
        "visual_prior_list": [],
        "audio_prior_list": "A calm tone.",
        "peak_AU_list": [],
        "text": "Hi.",
    }
    coarse = {n: entry | {"peak_index": str(i + 8), "pseu_emotion": "x", "caption": n} for i, n in enumerate("abcd")}
    write(tmp_path / "MERR_coarse_grained.json", json.dumps(coarse))
    fine = {"a": entry | {"peak_index": "8", "text": "", "pseu_emotion": "happy", "smp_reason_caption": "Thus."}}
    write(tmp_path / "MERR_fine_grained.json", json.dumps(fine))
    found = read_annotations(find_annotation_files("merr", tmp_path, videos=tmp_path))
    clips = {(clip.split, clip.name): clip for clip in found.clips}
    assert [*clips] == [("coarse", "a"), ("coarse", "d"), ("fine", "a")]
    one = clips["coarse", "a"]
    assert (one.emotion, one.peak_index, one.frame_count, one.valence) == ("happy", 7, 75, None)
    assert (one.caption_coarse, one.subtitle, clips["coarse", "d"].peak_index) == ("a", "Hi.", 10)
    assert (clips["fine", "a"].caption_fine, clips["fine", "a"].peak_index) == ("Thus.", 7)
    assert [(name, kind) for kind, name, _ in told(found) if kind == "unknown_label"] == [
        ("b", "unknown_label"),
        ("c", "unknown_label"),
    ]
    assert [kind for kind, *_ in told(found)].count("counted_from_1") == 2


@pytest.mark.parametrize("files", [MER, MER_CSV], ids=["txt", "csv"])
@pytest.mark.parametrize("name", ["mer2023", "mer2024"])
def test_a_sound_mer(tmp_path, files, name):
    subtitles = {"subtitle_eng.csv": "name,sentence\na,A\nb,B\nc,C\n"}
    tree(tmp_path, files | subtitles, "a b c", tuple(f"features/{name}" for name in USUAL), "videos")
    found = read_annotations(find_annotation_files(name, str(tmp_path)), strict=True)
    shown = sorted((c.split, c.name, c.emotion, c.valence, c.subtitle) for c in found.clips)
    assert shown == [
        ("test1", "b", "sad", -1, "B"),
        ("test3", "c", "worried", None, "C"),
        ("train", "a", "happy", 1.5, "A"),
    ]
    assert all(c.video and c.has_feature == (True, True, True) for c in found.clips)
    assert find_annotation_files(name, tmp_path).labels == labels.MER2023


def test_a_sound_mer2024_as_it_is_handed_out(tmp_path):
    files = {
        "label-disdim.csv": "name,discrete,valence\na,happy,1.5\n",
        "MER2024-noise_NCE.txt": "b 4 sad\n",
        "MER2024_noise_pseu_label_8348.txt": "b 4 angry\n",  # guesses about the same clips
        "label-transcription.csv": "name,sentence,sentence_en\na,你,A\nb,你,B\n",
    }
    tree(tmp_path, files, "a b", ("mae_340_23_UTT", "maeVideo_399_23_UTT", "HL_23_UTT"), "video-labeled")
    found = read_annotations(find_annotation_files("mer2024", tmp_path), strict=True)
    shown = collections.Counter((c.split, c.name, c.emotion, c.subtitle) for c in found.clips)
    assert shown == collections.Counter([("train", "a", "happy", "A"), ("noise", "b", "sad", "B")])


@pytest.mark.parametrize("fold", [1, 5])
@pytest.mark.parametrize("official", [True, False], ids=["tables", "lists"])
def test_a_sound_dfew(tmp_path, fold, official):
    tables = {
        f"EmoLabel_DataSplit/{split}(single-labeled)/set_{k}.csv": f"video_name,label\n{number},{label}\n"
        for k in (1, 5)
        for split, number, label in (("train", k, 1), ("test", k + 1, 7))
    }
    lists = {
        f"reltive_DFEW_set_{k}_{s}.txt": f"{n} {e}\n"
        for k in (1, 5)
        for s, n, e in (("train", k, "happy"), ("test", k + 1, "fear"))
    }
    tree(tmp_path, tables if official else lists, "00001 00002 00005 00006", USUAL, "Clip/original")
    found = read_annotations(find_annotation_files("dfew", tmp_path, fold=fold), strict=True)
    shown = {c.split: (c.name, c.emotion, c.video and c.video.name) for c in found.clips}
    assert shown == {
        "train": (str(fold), "happy", f"{fold:05}.mp4"),
        "test": (str(fold + 1), "fear", f"{fold + 1:05}.mp4"),
    }
    assert all(c.has_feature == (True, True, True) for c in found.clips)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("merr", "MERR_coarse_grained.txt, MERR_fine_grained.txt"),
        ("mer2023", "relative_train_NCEV.txt, relative_test*_NCEV.txt, train-label*.csv"),
        ("mer2024", "label-disdim.csv, train-label*.csv"),
        ("dfew", "EmoLabel_DataSplit/train(single-labeled)/set_1.csv"),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_folders_without_lists(tmp_path, name, wanted, there):
    root = tmp_path if there else tmp_path / "none"
    with pytest.raises(UserError, match=rf"^no list of clips in {re.escape(str(root))}; .*{re.escape(wanted)}"):
        find_annotation_files(name, root)
