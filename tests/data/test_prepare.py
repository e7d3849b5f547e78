"""From videos to records: what is kept, in which order, and what happens when it is stopped or a clip is bad."""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from emollama_jax import cli
from emollama_jax.data import parts
from emollama_jax.data.annotations import Annotations, Clip
from emollama_jax.data.parts import EncodedClips, PartMaker
from emollama_jax.data.prepare import prepare
from emollama_jax.data.recipe import Recipe
from emollama_jax.data.records import Records, decode_frame, read_clip_info
from emollama_jax.errors import UserError
from emollama_jax.media.images import eva_vit_frame
from emollama_jax.text.labels import MERR
from tests.media.hostile import one_frame

av = pytest.importorskip("av")
RECIPE = Recipe(labels=MERR, size=32)
FRAMES = 6


def write_video(path: Path, shade: int, frames: int = FRAMES) -> Path:
    """A video whose i-th frame is of the grey `shade` + 20 i."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for i in range(frames):
            pixels = np.full((32, 48, 3), shade + 20 * i, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        file.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Eight clips in two splits, with a feature or two."""
    folder = tmp_path_factory.mktemp("clips")
    np.save(folder / "mae.npy", np.full(1024, 3.0))
    np.save(folder / "voice.npy", np.arange(2 * 1024, dtype=np.float32).reshape(2, 1024))
    return tuple(
        Clip(
            name=f"clip_{i}",
            split="val" if i > 5 else "train",
            emotion=MERR[i],
            valence=None if i else 0.5,
            subtitle="Grüße, 你好 😀",
            caption_coarse="a",
            caption_fine="",
            peak_index=i % FRAMES,
            video=write_video(folder / f"clip_{i}.mp4", 10 * i),
            features=(folder / "mae.npy", None, folder / "voice.npy" if i % 2 else None),
        )
        for i in range(8)
    )


def prepared(clips, out, recipe=RECIPE, make_parts=None):
    return prepare("clips", Annotations(tuple(clips), ()), out, recipe, make_parts or PartMaker())


def grey(record) -> int:
    return round(float(np.median(decode_frame(record["frame"]))))


def test_records_hold_what_is_known(clips, tmp_path):
    made = prepared(clips, tmp_path)
    assert (made.counts, made.problems, made.was_there) == ({"train": 6, "val": 2}, (), False)
    records = Records(made.path, "train")
    assert [record["name"] for record in (records[i] for i in range(6))] == [f"clip_{i}" for i in range(6)]
    one = records[1]
    assert (one["emotion"], one["subtitle"], one["caption_coarse"], one["caption_fine"]) == (
        1,
        "Grüße, 你好 😀",
        "a",
        "",
    )
    assert np.isnan(one["valence"]) and records[0]["valence"] == 0.5
    assert one["has_feature"].tolist() == [True, False, True]
    voice = np.load(clips[1].features[2]).mean(0)
    np.testing.assert_array_equal(one["features"], [np.full(1024, 3), np.zeros(1024), voice])
    assert one["features"].dtype == np.float32
    np.testing.assert_array_equal(decode_frame(one["frame"]), eva_vit_frame(one_frame(clips[1].video), 32))
    assert records.metadata["labels"] == list(MERR)
    assert records.metadata["recipe"]["frame_rule"] == "first"
    assert {path.name for path in tmp_path.iterdir()} == {"clips", ".clips-frame.lock"}


@pytest.mark.parametrize(
    ("rule", "index"),
    [("first", lambda i: 0), ("middle", lambda i: 3), ("peak", lambda i: i), ("4", lambda i: 4), ("99", lambda i: 5)],
)
def test_frame_rules(clips, tmp_path, rule, index):
    records = Records(prepared(clips[:6], tmp_path, dataclasses.replace(RECIPE, frame_rule=rule)).path, "train")
    shades = [10 * i + 20 * index(i) for i in range(6)]
    assert [grey(records[i]) for i in range(6)] == pytest.approx(shades, abs=4)


def test_workers_and_parts_change_nothing(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "CLIPS_PER_PART", 2)
    one, two = (prepared(clips, tmp_path / str(n), make_parts=PartMaker(workers=n)) for n in (0, 2))
    for split in ("train", "val"):
        ours, theirs = Records(one.path, split), Records(two.path, split)
        assert len(ours) == len(theirs)
        for i in range(len(ours)):
            assert ours[i].keys() == theirs[i].keys()
            assert all(np.array_equal(ours[i][key], theirs[i][key], equal_nan=key == "valence") for key in ours[i])


def test_a_stopped_preparation_goes_on(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "CLIPS_PER_PART", 2)
    done = []

    def stop(count, aside):
        done.append(count)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(clips, tmp_path, make_parts=PartMaker(on_part=stop))
    first, second = sorted(tmp_path.glob(".*.partial/train/*.array_record"))
    made = [path.stat().st_mtime_ns for path in (first, second)]
    goes_on = PartMaker(on_part=lambda *_: done.append([path.stat().st_mtime_ns for path in (first, second)]))
    result = prepared(clips, tmp_path, make_parts=goes_on)
    assert done == [2, 2, made, made]  # the parts that were finished are not made again
    assert result.counts == {"train": 6, "val": 2} and not list(tmp_path.glob(".*.partial"))
    assert prepared(clips, tmp_path, make_parts=goes_on) == dataclasses.replace(result, was_there=True)
    assert len(done) == 4
    whole = prepared(clips, tmp_path / "whole")
    assert [Records(result.path, "train")[i]["frame"] for i in range(6)] == [
        Records(whole.path, "train")[i]["frame"] for i in range(6)
    ]


def test_records_are_split_into_files_of_equal_numbers(clips, tmp_path, monkeypatch):
    whole = Records(prepared(clips, tmp_path / "whole").path, "train")
    monkeypatch.setattr("emollama_jax.data.prepare.SHARD_BYTES", 1)
    monkeypatch.setattr(parts, "CLIPS_PER_PART", 4)
    path = prepared(clips, tmp_path / "split").path
    assert sorted(file.name for file in path.glob("*train*")) == [
        f"clips-train.array_record-0000{i}-of-00006" for i in range(6)
    ]
    records = Records(path, "train")
    assert [records[i]["name"] for i in range(6)] == [f"clip_{i}" for i in range(6)]
    assert all(records[i]["frame"] == whole[i]["frame"] for i in range(6))
    assert [(info["name"], info["frame"]) for info in read_clip_info(path)] == [(f"clip_{i}", 0) for i in range(8)]


def test_records_of_the_first_version_are_read_and_found_again(clips, tmp_path):
    made = prepared(clips, tmp_path)
    file = made.path / "metadata.json"
    metadata = json.loads(file.read_text())
    today = metadata["recipe"]
    metadata["recipe"] = {
        "labels": today["labels"],
        "frame": "first",
        "image": "frame",
        "size": 32,
        "encoder": "sha256:1",
        "image_tokens_shape": today["image_tokens_shape"],
        "feature_size": 1024,
        "encoders": {"mae": "sha256:2"},
        "subtitles": [],
    }
    file.write_text(json.dumps(metadata))
    encoders = {"mae": "sha256:2", "eva_vit": "sha256:1"}
    assert Records(made.path, "train").metadata["recipe"] == today | {"encoders": encoders}
    assert prepared(clips, tmp_path).was_there
    first = hashlib.sha256(json.dumps({**metadata["recipe"], "encoder": "", "encoders": {}}).encode())
    assert RECIPE.fingerprint(()) == first.hexdigest()[:16]


@pytest.mark.parametrize("name", [".1.0.0.01234567.partial", "incomplete.XXXXXX_1.0.0"])
def test_a_process_killed_as_it_wrote_the_data_set(clips, tmp_path, name):
    half = tmp_path / "clips/frame" / name
    half.mkdir(parents=True)
    (half / "clips-train.array_record-00000-of-00001").write_bytes(b"half")
    made = prepared(clips, tmp_path)
    assert not half.exists() and len(Records(made.path, "train")) == 6


def test_bad_clips_are_put_aside_by_name(clips, tmp_path):
    (tmp_path / "cut.mp4").write_bytes(clips[0].video.read_bytes()[:300])
    bad = [
        dataclasses.replace(clips[0], name="cut", video=tmp_path / "cut.mp4"),
        dataclasses.replace(clips[0], name="none", video=None),
        dataclasses.replace(clips[0], name="late", split="test", peak_index=None),
    ]
    recipe = dataclasses.replace(RECIPE, frame_rule="peak")
    made = prepared([*bad[:2], *clips, bad[2]], tmp_path / "out", recipe)
    assert made.counts == {"train": 6, "val": 2}  # and no split without clips
    assert [problem.name for problem in made.problems] == ["cut", "none", "late"]
    assert "not a video, or damaged or cut short" in made.problems[0].message
    assert "clip late has no peak frame" in made.problems[2].message
    assert prepared([*bad[:2], *clips, bad[2]], tmp_path / "out", recipe).problems == made.problems
    with pytest.raises(UserError, match="not one of 1 clips could be prepared, the first: clip none has no video"):
        prepared(bad[1:2], tmp_path / "nothing")


def test_two_at_the_same_time(clips, tmp_path):
    with (tmp_path / ".clips-frame.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process prepares this data set: .*; wait for it"):
            prepared(clips, tmp_path)
    assert prepared(clips, tmp_path).counts == {"train": 6, "val": 2}


def test_a_data_set_may_move(clips, tmp_path, monkeypatch):
    """It is known by its files' names, sizes and times, not by where the preparation was started."""
    made = prepared(clips, tmp_path)
    monkeypatch.chdir(clips[0].video.parent)
    moved = [dataclasses.replace(clip, video=Path(clip.video.name)) for clip in clips]
    assert prepared(moved, tmp_path) == dataclasses.replace(made, was_there=True)


def test_other_files_or_settings_are_refused(clips, tmp_path):
    path = prepared(clips, tmp_path).path
    for other in (clips[:-1], [dataclasses.replace(clips[0], subtitle="x"), *clips[1:]]):
        with pytest.raises(UserError, match=f"prepared before from other files or settings: {path}; remove it"):
            prepared(other, tmp_path)
    with pytest.raises(UserError, match="prepared before from other files"):
        prepared(clips, tmp_path, dataclasses.replace(RECIPE, frame_rule="middle"))


def test_image_tokens(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "CLIPS_PER_PART", 4)
    encoders = {"eva_vit": "sha256:1"}
    recipe = dataclasses.replace(RECIPE, image_storage="image_tokens", encoders=encoders, image_tokens_shape=(3, 2))

    def encode(reads):
        frames = np.stack([read.media.frame for read in reads])
        shades = np.median(frames, axis=(1, 2, 3)).astype(np.float32)
        return EncodedClips(image_tokens=shades[:, None, None] * np.ones((1, 3, 2), np.float32))

    made = prepared(clips, tmp_path, recipe, make_parts=PartMaker(encode=encode))
    records, frames = Records(made.path, "train"), Records(prepared(clips, tmp_path).path, "train")
    for i in range(6):
        assert "frame" not in records[i] and records[i]["image_tokens"].dtype == np.float16
        assert (records[i]["image_tokens"] == grey(frames[i])).all() and records[i]["image_tokens"].shape == (3, 2)
    assert records.metadata["recipe"]["encoders"] == encoders


def test_the_order_of_frames_does_not_depend_on_the_container(tmp_path):
    path = write_video(tmp_path / "a.mp4", 0)
    found = [round(float(np.median(one_frame(path, i)))) for i in range(FRAMES + 2)]
    assert found == pytest.approx([0, 20, 40, 60, 80, 100, 100, 100], abs=4)
    with pytest.raises(UserError, match="^no such file: "):
        one_frame(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match="^not a video, or damaged or cut short: .*text.mp4"):
        one_frame(tmp_path / "text.mp4")


# -- damaged data sets


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: shutil.rmtree(path), "no prepared data set: .*; give the folder with features.json"),
        (lambda path: (path / "dataset_info.json").write_text("{"), "damaged data set: .*; prepare it again"),
        (lambda path: [f.unlink() for f in path.glob("*train*")], "damaged records|cannot be read"),
        (
            lambda path: [f.write_bytes(f.read_bytes()[:-2000]) for f in path.glob("*train*")],
            "damaged records|cannot be read",
        ),
    ],
    ids=["gone", "info", "shard", "cut"],
)
def test_damaged_data_sets_are_named(clips, tmp_path, spoil, said):
    path = prepared(clips, tmp_path).path
    spoil(path)
    with pytest.raises(UserError, match=said) as caught:
        records = Records(path, "train")
        [records[i] for i in range(len(records))]
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


# -- the command


@pytest.fixture
def merr(tmp_path):
    """MERR's files, for two clips and one whose video is damaged."""
    root = tmp_path / "MERR"
    (root / "video").mkdir(parents=True)
    lines, captions = [], {}
    for i, name in enumerate(("a", "b", "c")):
        write_video(root / f"video/{name}.mp4", 10 * i)
        lines.append(f"{name} {MERR[i]}")
        captions[name] = {"caption": "coarse", "smp_reason_caption": "fine", "text": "hello", "peak_index": 2}
    (root / "video/c.mp4").write_bytes(b"no video")
    for kind in ("coarse", "fine"):
        (root / f"MERR_{kind}_grained.txt").write_text("\n".join(lines))
        (root / f"MERR_{kind}_grained.json").write_text(json.dumps(captions))
    return root


def run(capsys, *arguments):
    code = cli.main(["prepare", *map(str, arguments)])
    return code, capsys.readouterr()


def test_the_command(capsys, merr, tmp_path):
    out = tmp_path / "out"
    code, said = run(capsys, "merr", merr, "--out", out, "--frame", "peak", "--workers", 1)
    assert code == 1 and said.err == ""
    assert "clips: 6 (coarse 3, fine 3)" in said.out
    assert f"wrote {out / 'merr/frame/1.0.0'} (coarse 2, fine 2)" in said.out
    assert f"2 clips put aside: {out / 'merr.problems.jsonl'}" in said.out
    problems = [json.loads(line) for line in (out / "merr.problems.jsonl").read_text().splitlines()]
    assert [p["name"] for p in problems if p["kind"] == "not_prepared"] == ["c", "c"]
    record = Records(out / "merr/frame/1.0.0", "fine")[1]
    assert (record["name"], record["caption_fine"], record["subtitle"]) == ("b", "fine", "hello")
    code, again = run(capsys, "merr", merr, "--out", out, "--frame", "peak")
    assert code == 1 and "already there: " in again.out


def test_clips_that_annotations_put_aside_count_too(capsys, merr, tmp_path):
    table = tmp_path / "own.csv"
    table.write_text("name,emotion\na,happy\nb,gloomy\n")
    options = ("--list", f"train={table}", "--videos", merr / "video", "--out", tmp_path / "o")
    code, said = run(capsys, "clips", *options)
    assert code == 1 and "1 clips put aside" in said.out and "(train 1)" in said.out
    table.write_text("name,emotion\na,merry\nb,gloomy\n")
    code, said = run(capsys, "clips", *options)
    report = tmp_path / "o/clips.problems.jsonl"
    assert code == 2 and f"no clip that can be used in {table}; {report} says why" in said.err
    assert [json.loads(line)["kind"] for line in report.read_text().splitlines()] == ["unknown_label"] * 2


def test_clips_of_ones_own(capsys, merr, tmp_path):
    """In files as people have them: by folders, named in GBK, with a bad row among the subtitles, labels by numbers."""
    videos = tmp_path / "videos"
    (videos / "1").mkdir(parents=True)
    os.rename(merr / "video/a.mp4", os.path.join(os.fsencode(videos / "1"), "中文.mp4".encode("gbk")))
    os.rename(merr / "video/b.mp4", videos / "b.mp4")
    table, subtitles = tmp_path / "own.csv", tmp_path / "said.csv"
    table.write_bytes("name;label\n中文;2\nb;1\n".encode("gbk"))
    subtitles.write_bytes("name,sentence\n中文,谢谢你\nb,Oh\nbad,row,here\n".encode("gbk"))
    lists = ("--list", f"train={table}", "--subtitles", subtitles, "--videos", videos)
    labels = ("--labels", "Calm, Tense", "--label-numbers", 1)
    code, said = run(capsys, "clips", *lists, *labels, "--out", tmp_path / "o")
    assert code == 0 and "(train 2)" in said.out and "1 problems, 0 clips put aside" in said.out
    records = Records(tmp_path / "o/clips/frame/1.0.0", "train")
    shown = [(record["name"], record["emotion"], record["subtitle"]) for record in (records[0], records[1])]
    assert shown == [("中文", 1, "谢谢你"), ("b", 0, "Oh")]
    assert records.metadata["labels"] == ["Calm", "Tense"]
    code, said = run(capsys, "clips", *lists, *labels[:2], "--out", tmp_path / "none")
    assert code == 2 and "'2' is none of Calm, Tense; say from which number on the labels are counted" in said.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("merr",), "merr: give its folder"),
        (("clips",), "clips: give one or more --list SPLIT=FILE"),
        (("clips", "--list", "train.csv"), "--list train.csv: write SPLIT=FILE"),
        (("merr", "{merr}", "--frame", "last"), "frame rule 'last': give first, middle, peak or a frame's number"),
        (("merr", "{merr}", "--image", "image_tokens"), "--eva-vit: the encoder's file goes with --image image_tokens"),
        (("merr", "{merr}", "--eva-vit", "x.pth"), "--eva-vit: the encoder's file goes with"),
        (("dfew", "{merr}"), "no list of clips in"),
        (("merr", "nowhere"), "no list of clips in nowhere"),
        (("merr", "{merr}", "--image", "image_tokens", "--eva-vit", "{merr}/none.pth"), "no such file or folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_arguments_that_make_no_sense(capsys, merr, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, printed = run(capsys, *(argument.format(merr=merr) for argument in arguments))
    assert code == 2 and said in printed.err and printed.err.count("\n") == 1
    assert not (tmp_path / "data/merr/frame").exists()
