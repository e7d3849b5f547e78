"""Annotations found by their usual names in a folder."""

import collections
import json
import re
from pathlib import Path

import pytest

from emollama_jax.data.annotation_files import find_annotation_files
from emollama_jax.data.annotations import read_annotations
from emollama_jax.errors import UserError
from emollama_jax.text import labels
from tests.data.annotation_samples import entry, save, told, write


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
