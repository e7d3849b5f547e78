"""The one way a clip is read: which words and which frame are taken, and what becomes of clips that cannot be read."""

from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest

from emollama_jax.errors import UserError
from emollama_jax.media import clip_reader
from emollama_jax.media.clip import ClipConfig, ClipRequest, ReadSpec
from emollama_jax.media.clip_reader import ClipReader

av = pytest.importorskip("av")
FRAME = ReadSpec(32, None, None, False)
FRAMES = 6
AU = "frame,success,AU01_r\n" + "".join(f"{i + 1},1,{float(i == 4)}\n" for i in range(FRAMES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A silent video whose i-th frame is of the grey 20 i, its subtitles, and OpenFace's action units."""
    folder = tmp_path_factory.mktemp("clips")
    for name in ("a", "b"):
        with av.open(str(folder / f"{name}.mp4"), "w") as file:
            stream = file.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for i in range(FRAMES):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 48, 3), 20 * i, np.uint8))))
            file.mux(stream.encode())
    (folder / "a.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nIn a file.\n")
    (folder / "a.csv").write_text(AU)
    return folder


def read(requests, config=None, frame_rule="first", **options):
    return [*ClipReader(config, FRAME, frame_rule=frame_rule, **options).read(requests)]


def test_words_are_those_given_else_of_the_first_source_that_has_some(folder, monkeypatch):
    requests = [ClipRequest("a", folder / "a.mp4", "Given."), *(ClipRequest(n, folder / f"{n}.mp4") for n in "ab")]
    assert [one.subtitle for one in read(requests)] == ["Given.", "", ""]
    found = read(requests, subtitle_sources=("track", "file"), workers=1)
    assert [(one.name, one.subtitle) for one in found] == [("a", "Given."), ("a", "In a file."), ("b", "")]
    monkeypatch.setattr("emollama_jax.media.subtitles.read_sound", lambda path: np.zeros(16, np.float32))
    heard = {"transcribe": lambda waveform: "Heard."}
    in_order = lambda *sources: [one.subtitle for one in read(requests, subtitle_sources=sources, **heard)]
    assert in_order("file", "speech") == ["Given.", "In a file.", "Heard."]
    assert in_order("speech", "file") == ["Given.", "Heard.", "Heard."]


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

    def exhausted(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(clip_reader, "read_clip", exhausted)
    (large,) = read(requests[2:])
    assert str(large) == f"{folder / 'a.mp4'}: does not fit into the memory; cut it, or make it smaller"
    monkeypatch.setattr(clip_reader, "map_ahead", lambda work, jobs, *_: (BrokenProcessPool() for _ in jobs))
    (dead,) = read(requests[2:])
    assert f"{folder / 'a.mp4'}: the process that decoded it died" in str(dead)


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
