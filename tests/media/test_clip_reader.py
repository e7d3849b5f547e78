"""The one way a clip is read: which words and which frame are taken, and what becomes of clips that cannot be read."""

import re

import numpy as np
import pytest

from emollama_jax.errors import UserError
from emollama_jax.io.worker_pool import WorkerDied
from emollama_jax.media import clip_reader
from emollama_jax.media.clip import ClipConfig, ClipRequest, ReadSpec
from emollama_jax.media.clip_reader import ClipReader
from tests.media.hostile import Sound, spoil, tone, write

av = pytest.importorskip("av")
FRAME = ReadSpec(32, None, None, False)
FRAMES = 6
AU = "frame,success,AU01_r\n" + "".join(f"{i + 1},1,{float(i == 4)}\n" for i in range(FRAMES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A video whose i-th frame is of the grey 20 i, with a tone, its subtitles, and OpenFace's action units."""
    folder = tmp_path_factory.mktemp("clips")
    for name in ("a", "b"):
        frames = (np.full((32, 48, 3), 20 * i, np.uint8) for i in range(FRAMES))
        write(folder / f"{name}.mp4", frames, rate=10, codec="mpeg4", sound=Sound(tone(FRAMES / 10)))
    (folder / "a.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nIn a file.\n")
    (folder / "a.csv").write_text(AU)
    return folder


def read(requests, config=None, frame_rule="first", **options):
    return [*ClipReader(config, FRAME, frame_rule=frame_rule, **options).read(requests)]


def test_words_are_those_given_else_of_the_first_source_that_has_some(folder):
    requests = [ClipRequest("a", folder / "a.mp4", "Given."), *(ClipRequest(n, folder / f"{n}.mp4") for n in "ab")]
    assert [one.subtitle for one in read(requests)] == ["Given.", "", ""]
    found = read(requests, subtitle_sources=("track", "file"), workers=1)
    assert [(one.name, one.subtitle) for one in found] == [("a", "Given."), ("a", "In a file."), ("b", "")]
    heard = {"transcribe": lambda waveform: "Heard." if 9000 < len(waveform) < 10000 else "Nothing."}
    in_order = lambda *sources: [one.subtitle for one in read(requests, subtitle_sources=sources, **heard)]
    assert in_order("file", "speech") == ["Given.", "In a file.", "Heard."]
    assert in_order("speech", "file") == ["Given.", "Heard.", "Heard."]


def test_sound_that_cannot_be_heard_leaves_the_clip(tmp_path):
    path = write(tmp_path / "a.mkv", [np.zeros((32, 48, 3), np.uint8)] * 2, sound=Sound(tone(0.2), codec="flac"))
    spoil(path, "audio")
    (found,) = read([ClipRequest("a", path)], subtitle_sources=("speech",), transcribe=lambda waveform: "Heard.")
    assert found.subtitle == "" and found.media.frame is not None
    (note,) = found.media.clip_info["notes"]
    assert note.startswith("its words cannot be heard (not a video, or damaged or cut short: ")


def test_the_peak_is_the_one_listed_else_by_openface_else_looked_for(folder):
    video, openface = folder / "a.mp4", folder / "a.csv"
    listed, measured, unknown = (
        ClipRequest("a", video, peak_index=2, openface=openface),
        ClipRequest("a", video, openface=openface),
        ClipRequest("a", video),
    )
    found = read([listed, measured, unknown], ClipConfig(max_faces=2), "peak")
    assert [one.media.clip_info["frame"] for one in found[:2]] == [2, 4]
    assert found[2].media.clip_info["faces_looked_for"] == 2
    *known, error = read([listed, measured, unknown], frame_rule="peak")
    assert [round(float(np.median(one.media.frame)) / 20) for one in known] == [2, 4]
    assert str(error) == "clip a has no peak frame; take another frame rule, or emollama extract to find it"


def test_clips_that_cannot_be_read_are_named_and_the_others_are_read(folder, monkeypatch):
    (folder / "text.mp4").write_text("no video")
    requests = [ClipRequest("none", None), ClipRequest("text", folder / "text.mp4"), ClipRequest("a", folder / "a.mp4")]
    no_video, damaged, sound = read(requests, workers=1)
    assert str(no_video) == "clip none has no video; put it into the folder of videos"
    assert isinstance(damaged, UserError) and "text.mp4" in str(damaged) and sound.name == "a"

    problems = {"does not fit into the memory; cut": MemoryError(), "(KeyError: 'x'); write": KeyError("x")}
    for said, raised in problems.items():

        def fail(*args, raised=raised, **kwargs):
            raise raised

        monkeypatch.setattr(clip_reader, "read_clip", fail)
        reader = ClipReader(None, FRAME, frame_rule="first")
        error = reader._read(requests[2])
        assert str(error).startswith(f"{folder / 'a.mp4'}: ") and said in str(error)


@pytest.mark.parametrize(
    ("died", "said"),
    [
        (WorkerDied(-6), "SIGABRT, a fault of PyAV"),
        (WorkerDied(-9), "SIGKILL, as the system ends one for want of memory"),
        (WorkerDied(1), "exit code 1, "),
    ],
)
def test_a_clip_that_ends_its_process_is_read_without_its_sound(folder, monkeypatch, died, said):
    request = ClipRequest("a", folder / "a.mp4")
    monkeypatch.setattr(clip_reader, "map_ahead", lambda work, jobs, *_: (died for _ in jobs))
    reader = ClipReader(ClipConfig(max_faces=1), FRAME._replace(sound=True), frame_rule="first")
    (found,) = reader.read([request])
    assert found.media.frame is not None and found.media.waveform is None
    (note,) = found.media.clip_info["notes"]
    assert re.search(rf"its sound is left out: it ended the process that decoded it \({said}", note)
    (dead,) = read([request])  # of which no sound was wanted
    assert re.match(rf"{request.video}: it ended the process that decoded it: {said}", str(dead))


def test_channels_in_an_order_of_their_own_are_heard(tmp_path):
    """Some versions of PyAV free their list twice, which would end the process."""
    path = write(tmp_path / "a.mov", [np.zeros((32, 48, 3), np.uint8)] * 5, sound=stereo(0.2))
    swap_channels(path)
    reader = ClipReader(ClipConfig(max_faces=1), FRAME._replace(sound=True), frame_rule="first", workers=0)
    (found,) = reader.read([ClipRequest("a", path)])
    assert found.media.frame is not None and "notes" not in found.media.clip_info
    assert len(found.media.waveform) == pytest.approx(3200, abs=2) and found.media.waveform.std() > 0.9


def stereo(seconds):
    return Sound(tone(seconds, channels=2), codec="pcm_s16le", layout="stereo")


def swap_channels(path):
    """Describe the channels one by one, right before left: the atom `chan` of QuickTime's file format."""
    data = bytearray(path.read_bytes())
    start = data.index(b"chan") - 4
    size = int.from_bytes(data[start : start + 4])
    described = b"".join(label.to_bytes(4) + bytes(16) for label in (2, 1))
    atom = b"chan" + bytes(4) + bytes(8) + (2).to_bytes(4) + described
    data[start : start + size] = (len(atom) + 4).to_bytes(4) + atom
    sound = data.rindex(b"trak", 0, start)  # of several tracks
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"sowt"):
        place = data.index(name, sound if name not in (b"moov", b"trak") else 0) - 4
        place = sound - 4 if name == b"trak" else place
        grown = int.from_bytes(data[place : place + 4]) + len(atom) + 4 - size
        data[place : place + 4] = grown.to_bytes(4)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"frame_rule": "last"}, "frame rule 'last': give first, middle, peak or a frame's number from 0"),
        ({"subtitle_sources": ("air",)}, "no source of subtitles: 'air'; give any of file, track, speech"),
        ({"subtitle_sources": ("speech",)}, "subtitles from speech need a model of Whisper"),
    ],
)
def test_options_refused(options, said):
    with pytest.raises(UserError, match=said):
        read([], **options)
