"""Synthetic clips: the files, the films, and that each modality tells what it should and nothing else."""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from emollama_jax.errors import UserError
from emollama_jax.synthetic import dataset
from emollama_jax.synthetic.clip import (
    LABELS,
    NUM_FRAMES,
    UNCLEAR_SHARE,
    UNCLEAR_SHARE_IN_TRAINING,
    Factors,
    clip_look,
    clip_rng,
    clip_sentence,
    clip_spec,
    clip_voice,
    peak_aus,
    render_clip,
)
from emollama_jax.synthetic.dataset import make_dataset
from emollama_jax.synthetic.face import EXPRESSIONS, SIZE, draw_face, motion
from emollama_jax.synthetic.voice import LOUDEST, random_speaker
from emollama_jax.synthetic.words import FACE_CLUES, SENTENCES, UNCLEAR, VOICE_CLUES, WORD_CLUES
from emollama_jax.text.answers import normalize_answer
from emollama_jax.text.labels import MERR

FPS, RATE = 12.5, 16000
CLIPS = {"train": 27, "val": 9, "test": 12}
LEVELS = {
    "face": ("smile", "drawn", "wide"),
    "voice": ("lively", "hushed", "firm"),
    "words": ("outcome", "news", "plan"),
}
SUBSETS = [names for size in (1, 2, 3) for names in itertools.combinations(Factors._fields, size)]


@pytest.fixture(scope="module")
def av():
    return pytest.importorskip("av", reason="PyAV writes and reads the videos")


@pytest.fixture(scope="module")
def made(av, tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("made") / "up", clips=CLIPS, workers=1)


@pytest.fixture(scope="module")
def rendered():
    """54 clips as they are before they are written."""
    specs = [clip_spec("train", index) for index in range(54)]
    return [(spec, *render_clip(spec)) for spec in specs]


@pytest.fixture(scope="module")
def many():
    """4500 clips that are only planned."""
    return [clip_spec("many", index, seed=3) for index in range(4500)]


def decoded(av, path):
    """(frames, samples, the file's length in seconds)."""
    with av.open(str(path)) as file:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
        seconds = file.duration / 1e6
    with av.open(str(path)) as file:
        assert file.streams.audio[0].rate == RATE and file.streams.audio[0].channels == 1
        samples = np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)])
    return frames, samples, seconds


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What a label stands for


@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_one_factor_leaves_three_labels_and_two_leave_one(names):
    by_levels = Counter(tuple(getattr(LABELS[label], name) for name in names) for label in MERR)
    assert set(by_levels.values()) == {3 if len(names) == 1 else 1}
    assert all(set(levels) == {getattr(f, name) for f in LABELS.values()} for name, levels in LEVELS.items())
    assert tuple(sorted(LABELS)) == tuple(sorted(MERR))


@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_the_best_guess_from_some_factors_is_right_as_often_as_stated(many, names):
    seen = defaultdict(Counter)
    for spec in many:
        seen[tuple(getattr(spec.factors, name) for name in names)][spec.label] += 1
    right = sum(labels.most_common(1)[0][1] for labels in seen.values()) / len(many)
    lost = UNCLEAR_SHARE * len(names) / 3  # one of these is the unclear one
    expected = {1: (1 - lost) / 3 + lost / 9, 2: 1 - lost + lost / 3, 3: 1.0}[len(names)]
    assert abs(right - expected) < (0.02 if len(names) < 3 else 1e-9)


def fitting_labels(factor: str, level: str) -> tuple[str, ...]:
    """The labels that have this level of a factor: three, or all when it is unclear."""
    return tuple(label for label in MERR if level in (UNCLEAR, getattr(LABELS[label], factor)))


def test_an_unclear_factor_is_rare_and_each_as_often(many):
    unclear = Counter(name for spec in many for name, level in spec.factors._asdict().items() if level == UNCLEAR)
    assert all(abs(unclear[name] / len(many) - UNCLEAR_SHARE / 3) < 0.012 for name in Factors._fields)
    for spec in many:
        pairs = list(zip(spec.factors, LABELS[spec.label], strict=True))
        assert all(shown in (meant, UNCLEAR) for shown, meant in pairs) and spec.factors.count(UNCLEAR) <= 1
        fitting = [set(fitting_labels(name, level)) for name, level in spec.factors._asdict().items()]
        assert set.intersection(*fitting) == {spec.label}


def test_more_clips_are_unclear_in_training_than_elsewhere():
    specs = [clip_spec("train", index, seed=3) for index in range(4500)]
    share = sum(UNCLEAR in spec.factors for spec in specs) / len(specs)
    assert abs(share - UNCLEAR_SHARE_IN_TRAINING) < 0.02


def test_labels_are_balanced_in_an_order_that_says_nothing(many):
    blocks = [tuple(spec.label for spec in many[start : start + 9]) for start in range(0, len(many), 9)]
    assert all(sorted(block) == sorted(MERR) for block in blocks) and len(set(blocks)) == 500
    for label in MERR:
        mine = [spec for spec in many if spec.label == label]
        middle = sum(NUM_FRAMES) / 2
        assert abs(np.mean([spec.num_frames for spec in mine]) - middle) < 0.5  # more than 4 standard errors
        assert abs(np.mean([spec.peak_index / spec.num_frames for spec in mine]) - 0.55) < 0.02


# What a clip shows


def lips(pixels, look):
    """(how far the middle of the lips is below their ends, how far they reach from top to bottom), in half-widths."""
    (x, y), r = look.center, look.radius
    area = pixels[round(y + 0.42 * r) : round(y + 1.1 * r), round(x - 0.5 * r) : round(x + 0.5 * r)].astype(int)
    skin = look.skin[0] - look.skin[1]
    rows, columns = np.nonzero(area[..., 0] - area[..., 1] > skin + 18)  # nothing else there is so red
    left, right = columns.min(), columns.max()
    part = (columns - left) / (right - left)
    ends, middle = rows[(part < 0.12) | (part > 0.88)], rows[np.abs(part - 0.5) < 0.1]
    return (middle.mean() - ends.mean()) / r, (middle.max() - middle.min()) / r


def read_face(frames, spec):
    drop, opening = lips(frames[spec.peak_index], clip_look(spec))
    return "wide" if opening > 0.32 else "smile" if drop > 0 else "drawn"


def median_pitch(samples):
    """In Hz: of each 64 ms, the lag from 60 to 320 Hz at which the sound is most like itself."""
    lags = np.arange(RATE // 320, RATE // 60)
    found = []
    for start in range(0, len(samples) - 1024, 512):
        piece = samples[start : start + 1024]
        if np.std(piece) > 0.5 * np.std(samples):
            alike = np.correlate(piece, piece, "full")[1023:] / np.arange(1024, 0, -1)
            best = alike[lags].max()
            found.append(RATE / lags[np.flatnonzero(alike[lags] > 0.9 * best)[0]])  # not twice the period
    return np.median(found)


def read_voice(samples):
    if np.sqrt(np.mean(samples**2)) < 0.055:
        return "hushed"
    return "lively" if median_pitch(samples) > 160 else "firm"


@pytest.mark.slow
def test_the_lips_tell_the_level_of_the_face(rendered):
    clear = [(spec, frames) for spec, frames, _ in rendered if spec.factors.face != UNCLEAR]
    assert [read_face(frames, spec) for spec, frames in clear] == [spec.factors.face for spec, _ in clear]


def test_loudness_and_pitch_tell_the_level_of_the_voice(rendered):
    clear = [(spec.factors.voice, samples) for spec, _, samples in rendered if spec.factors.voice != UNCLEAR]
    assert [read_voice(samples) for _, samples in clear] == [level for level, _ in clear]


def test_words_of_other_clips_tell_the_level_of_the_words():
    def words(spec):
        return set(normalize_answer(clip_sentence(spec)).replace(",", "").split())

    levels = defaultdict(list)
    for spec in (clip_spec("train", index) for index in range(180)):
        levels[spec.factors.words].append(words(spec))
    vocabulary = set().union(*itertools.chain(*levels.values()))
    share = {
        level: {word: (sum(word in said for said in sentences) + 0.1) / (len(sentences) + 0.2) for word in vocabulary}
        for level, sentences in levels.items()
    }
    for spec in (clip_spec("val", index) for index in range(90)):
        said = words(spec)
        likely = {
            level: sum(np.log(p if word in said else 1 - p) for word, p in shares.items())
            for level, shares in share.items()
        }
        assert max(likely, key=likely.get) == spec.factors.words, clip_sentence(spec)


def test_a_sentence_is_of_one_level_and_names_no_emotion():
    sentences = [sentence for level in SENTENCES.values() for sentence in level]
    assert len(set(sentences)) == len(sentences)
    assert not any(label in sentence.lower() for label in MERR for sentence in sentences)


@pytest.mark.parametrize("index", range(4))
def test_a_modality_depends_on_its_own_factor_alone(index):
    spec = clip_spec("train", index)
    renderings = defaultdict(set)
    for label in MERR:
        factors = LABELS[label]
        other = replace(spec, label=label, factors=factors)
        frames, samples = render_clip(other)
        shown = dict(face=frames.tobytes(), voice=samples.tobytes(), words=clip_sentence(other))
        for name, what in shown.items():
            renderings[name, getattr(factors, name)].add(what)
    assert len(renderings) == 9 and all(len(different) == 1 for different in renderings.values())
    assert len(set.union(*renderings.values())) == 9


def test_the_face_moves_most_at_the_peak(rendered):
    hits = 0
    for spec, frames, _ in rendered:
        moved = np.abs(frames.astype(int) - frames[0]).sum(axis=(1, 2, 3))
        hits += abs(int(moved.argmax()) - spec.peak_index) <= 1
    assert hits >= 0.95 * len(rendered)


@pytest.mark.parametrize("num_frames, peak", [(22, 9), (30, 21), (5, 2)])
def test_motion_goes_from_nothing_to_the_peak_and_back(num_frames, peak):
    come = motion(peak, num_frames)
    assert come[0] == 0 and come[peak] == 1 == come.max() and come[-1] < 0.3
    assert np.all(np.diff(come[: peak + 1]) > 0) and np.all(np.diff(come[peak:]) < 0)


def test_the_clips_differ_in_face_place_and_colours(rendered):
    looks = [clip_look(spec) for spec, _, _ in rendered]
    assert len(set(looks)) == len(looks)
    for look in looks:
        left, top, right, bottom = look.box
        assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE
    centers = np.array([look.center for look in looks])
    assert np.ptp([look.radius for look in looks]) > 8 and np.all(np.ptp(centers, axis=0) > 10)
    assert {spec.num_frames for spec, _, _ in rendered} == set(range(NUM_FRAMES[0], NUM_FRAMES[1] + 1))


@pytest.mark.parametrize("au", sorted({au for aus in EXPRESSIONS.values() for au in aus}))
def test_every_action_unit_is_drawn(au):
    still = draw_face({})
    assert still.shape == (SIZE, SIZE, 3) and still.dtype == np.uint8
    assert np.abs(draw_face({au: 1.0}).astype(int) - still).max() > 20


def test_the_sound_is_whole_and_not_clipped(rendered):
    for spec, frames, samples in rendered:
        assert len(frames) == spec.num_frames and len(samples) == spec.num_frames / FPS * RATE
        assert samples.dtype == np.float32 and np.isfinite(samples).all()
        assert 0.05 < np.abs(samples).max() <= LOUDEST + 1e-6 and np.mean(np.abs(samples) > 0.99 * LOUDEST) < 1e-3
        assert abs(samples.mean()) < 1e-3
    assert len({samples.tobytes() for _, _, samples in rendered}) == len(rendered)


# Seeds


@pytest.mark.smoke
def test_a_seed_gives_the_same_clip_and_another_seed_another():
    one, again, other, other_split = (clip_spec(*a) for a in (("a", 5, 0), ("a", 5, 0), ("a", 5, 1), ("b", 5, 0)))
    assert one == again and all(np.array_equal(x, y) for x, y in zip(render_clip(one), render_clip(again), strict=True))
    for spec in (other, other_split):
        assert spec.seed != one.seed and clip_look(spec) != clip_look(one)
        assert not np.array_equal(clip_voice(spec)[:20000], clip_voice(one)[:20000])


def test_people_are_the_same_in_all_splits():
    looks = lambda people, seed=0: [
        clip_look(clip_spec(split, index, seed, people)) for split in ("train", "test") for index in range(20)
    ]
    (one,) = set(looks(1))
    assert len(set(looks(3))) == 3 and one not in looks(1, seed=1)
    assert len(set(looks(None))) == 40
    for index in range(20):  # all else is as it is
        spec, alone = clip_spec("train", index, 0), clip_spec("train", index, 0, 1)
        assert replace(alone, look=spec.look) == spec and alone.look != spec.look
        assert peak_aus(alone) == peak_aus(spec) and clip_sentence(alone) == clip_sentence(spec)
    speakers = lambda people: {
        random_speaker(clip_rng(clip_spec(split, index, 0, people), "speaker"))
        for split in ("train", "test")
        for index in range(20)
    }
    assert len(speakers(1)) == 1 and len(speakers(3)) == 3 and len(speakers(None)) == 40


@pytest.mark.slow
def test_more_processes_and_other_clips_change_nothing(made, tmp_path):
    some = make_dataset(tmp_path / "some", clips={"test": 9, "train": 12}, workers=2)
    assert set(some.clips) < set(made.clips)
    for clip in some.clips:
        assert some.video(clip).read_bytes() == made.video(clip).read_bytes()


# The files


@pytest.mark.slow
def test_every_video_is_what_was_rendered(av, made):
    assert len(list((made.root / "video").iterdir())) == len(made.clips) == sum(CLIPS.values())
    for clip in made.clips:
        frames, samples, seconds = decoded(av, made.video(clip))
        drawn, spoken = render_clip(clip)
        assert frames.shape == drawn.shape and np.abs(frames.astype(int) - drawn).mean() < 6
        assert abs(seconds - clip.num_frames / FPS) < 0.02
        # AAC comes in blocks of 1024: the last one is filled up.
        assert len(spoken) - 0.02 * RATE <= len(samples) < len(spoken) + 1024 + 0.02 * RATE
        assert np.isfinite(samples).all() and np.abs(samples).max() < 1
        heard = samples[: len(spoken)]
        assert np.corrcoef(heard, spoken[: len(heard)])[0, 1] > 0.95  # in time with the picture, too
        if clip.factors.face != UNCLEAR:
            assert read_face(frames, clip) == clip.factors.face
        if clip.factors.voice != UNCLEAR:
            assert read_voice(samples) == clip.factors.voice


def test_the_lists_are_those_of_the_reference(made):
    for split in CLIPS:
        lines = (made.root / f"relative_{split}_NCEV.txt").read_text().splitlines()
        clips = [clip for clip in made.clips if clip.split == split]
        assert len(lines) == len(clips) == CLIPS[split]
        for line, clip in zip(lines, clips, strict=True):
            name, frames, emotion, valence = line.split(" ")
            assert (name, int(frames), emotion) == (clip.name, clip.num_frames, clip.label)
            assert -5 <= float(valence) <= 5
        amounts = Counter(clip.label for clip in clips)
        assert set(amounts) == set(MERR) and max(amounts.values()) - min(amounts.values()) <= 1
    with (made.root / "transcription.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [list(row) for row in rows] == [["name", "sentence"]] * len(rows)
    assert {row["name"]: row["sentence"] for row in rows} == {clip.name: clip_sentence(clip) for clip in made.clips}


@pytest.mark.parametrize("grain, caption", [("coarse", "caption"), ("fine", "smp_reason_caption")])
def test_the_annotations_are_those_of_the_reference(made, grain, caption):
    entries = json.loads((made.root / f"MERR_{grain}_grained.json").read_text())
    lines = (made.root / f"MERR_{grain}_grained.txt").read_text().splitlines()
    clips = {clip.name: clip for clip in made.clips if clip.split == "train"}
    assert [line.split(" ") for line in lines] == [
        [name, str(clips[name].num_frames), clips[name].label] for name in entries
    ]
    amounts = Counter(entry["pseu_emotion"] for entry in entries.values())
    assert set(amounts) == set(MERR)
    assert len(entries) == {"coarse": 27, "fine": 18}[grain]
    aus = json.loads((made.root / "synthetic.json").read_text())["clips"]
    for name, entry in entries.items():
        clip = clips[name]
        assert set(entry) == {
            *("AU_list", "visual_prior_list", "audio_prior_list", "peak_index", "peak_AU_list", "text", "pseu_emotion"),
            caption,
        }
        assert entry["pseu_emotion"] == clip.label and entry["peak_index"] == clip.peak_index
        assert entry["text"] == clip_sentence(clip)
        strongest = sorted(entry["AU_list"], key=aus[name]["peak_aus"].get, reverse=True)
        assert 1 <= len(entry["peak_AU_list"]) <= 3 and entry["peak_AU_list"] == strongest[:3]
        assert len(entry["visual_prior_list"]) == len(entry["AU_list"])
        words = normalize_answer(entry[caption]).replace(",", "").split()
        assert len(words) < 30 and (words[-1] == clip.label if grain == "fine" else not set(words) & set(MERR))
        clues = (FACE_CLUES[clip.factors.face], VOICE_CLUES[clip.factors.voice], WORD_CLUES[clip.factors.words])
        assert all(clue in entry[caption] for clue in clues)


def test_how_it_was_made_is_told(made):
    told = json.loads((made.root / "synthetic.json").read_text())
    assert (told["version"], told["seed"], told["fps"], told["size"]) == (5, 0, FPS, SIZE)
    assert list(told["clips"]) == [clip.name for clip in made.clips]
    for clip in made.clips:
        entry = told["clips"][clip.name]
        assert Factors(**entry["factors"]) == clip.factors and entry["peak_index"] == clip.peak_index
        assert (entry["split"], entry["label"], entry["num_frames"]) == (clip.split, clip.label, clip.num_frames)
        left, top, right, bottom = entry["face_box"]
        assert left < entry["head"][0] < right and top < entry["head"][1] < bottom
    names = {f"relative_{split}_NCEV.txt" for split in CLIPS} | {"transcription.csv", "synthetic.json", "video"}
    names |= {f"MERR_{grain}_grained.{kind}" for grain in ("coarse", "fine") for kind in ("txt", "json")}
    assert {path.name for path in made.root.iterdir()} == names


def test_without_h264_the_video_is_mpeg4(av, tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", set(av.codecs_available) - {"libx264"})
    made = make_dataset(tmp_path / "up", clips={"val": 1})
    with av.open(str(made.video(made.clips[0]))) as file:
        assert file.streams.video[0].codec_context.name == "mpeg4"
    frames, _, _ = decoded(av, made.video(made.clips[0]))
    assert np.abs(frames.astype(int) - render_clip(made.clips[0])[0]).mean() < 8


# What goes wrong


def test_a_folder_with_something_in_it_is_left_alone(av, tmp_path):
    root = tmp_path / "up"
    root.mkdir()
    (root / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        make_dataset(root, clips={"train": 1})
    assert contents(tmp_path) == {"up/notes.txt": b"mine"}


def test_an_empty_folder_will_do(av, tmp_path):
    assert make_dataset(tmp_path, clips={"val": 0}).clips == ()
    assert (tmp_path / "relative_val_NCEV.txt").read_text() == ""


@pytest.mark.parametrize("problem", [KeyboardInterrupt, MemoryError])
def test_a_broken_run_leaves_nothing(av, tmp_path, monkeypatch, problem):
    specs = []

    def render_two(spec):
        specs.append(spec)
        if len(specs) > 2:
            raise problem
        return render_clip(spec)

    monkeypatch.setattr(dataset, "render_clip", render_two)
    with pytest.raises(problem):
        make_dataset(tmp_path / "up", clips={"train": 9}, workers=1)
    assert len(specs) == 3 and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="interrupts a group of processes, as a terminal does")
def test_an_interrupted_run_of_several_processes_leaves_nothing(av, tmp_path):
    arguments = f"{str(tmp_path / 'up')!r}, clips={{'train': 2000}}, workers=2"  # more than are made before the end
    code = f"from emollama_jax.synthetic.dataset import make_dataset; make_dataset({arguments})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=os.getcwd()
    )
    try:
        # By then both of them are at work, not only the first.
        while process.poll() is None and len(list(tmp_path.glob(".up.*/video/*.mp4"))) < 24:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in errors and errors.count("Traceback") == 1  # the parent's, none of a worker
    assert list(tmp_path.iterdir()) == []


WRONG = {
    "a negative number": ({"clips": {"train": -1}}, "clips: -1 of the split 'train'; give 0 or more"),
    "a path as a split": ({"clips": {"../x": 1}}, "split '../x'"),
    "no name": ({"clips": {"": 1}}, "split ''"),
    "a negative seed": ({"seed": -1}, "seed=-1"),
    "nobody": ({"people": 0}, "people=0"),
    "no workers": ({"workers": 0}, "workers=0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_out_of_range_are_refused(av, tmp_path, name):
    arguments, problem = WRONG[name]
    with pytest.raises(UserError, match=problem):
        make_dataset(tmp_path / "up", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_without_pyav_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'emollama_jax\[media\]'"):
        make_dataset(tmp_path / "up")
    assert list(tmp_path.iterdir()) == []
