"""Annotations of every kind of file, sound and damaged; what is wrong is named by clip, file and line."""

import json

import pytest

from emollama_jax.data.annotations import Annotations, Clip, read_annotations
from emollama_jax.text import labels
from emollama_jax.text.labels import ALIASES
from tests.data.annotation_samples import entry, files_of, names, read, save, told, write

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
