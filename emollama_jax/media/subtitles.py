"""What is said in a clip, as one line of plain text: out of a subtitle file, a track of the video, or its sound.

FFmpeg reads the files as it reads the tracks, so that both mean the same. What becomes of a caption:

    its place in time      captions are put in order and joined by spaces
    styles and positions   left out, and so are drawings, and comments in braces
    [music], [laughs]      left out wherever they stand, as notes of what is heard beside the words
    (laughs), *sighs*      left out where they are all of a line; within one, somebody may say them
    ♪ la la ♪              the words without the notes
    - Who? - Me.           the words without the dashes that begin a line
    MARY: who?             as it stands: a name and a word that is said look alike
    a line once more       said once, where no pause lies between: captions that roll or grow repeat what is still
                           on the screen. After a pause it is said again.

Axes: S samples.
"""

import html
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from emollama_jax.errors import UserError, first_line
from emollama_jax.media.audio import read_sound
from emollama_jax.media.container import damaged, import_av, open_media, read_packets

FORMATS = {".srt": "srt", ".vtt": "webvtt", ".ass": "ass", ".ssa": "ass"}  # suffix -> FFmpeg's name, best first
LANGUAGES = ("", ".en", ".eng", ".zh", ".chi")  # of files beside a video: clip.srt goes before clip.en.srt
SOURCES = ("file", "track", "speech")
LARGEST = 2**24  # bytes of a subtitle file; those of films have less than a hundredth
MODEL_FILES = ("model.bin", "config.json", "tokenizer.json")  # a folder without the last would have it downloaded
PAUSE_S = 0.1  # captions closer than this roll on

Transcribe = Callable[[Float[np.ndarray, " S"]], str]

_DRAWING = re.compile(r"\{[^}]*\\p[1-9][^}]*\}[^{]*")
_ESCAPES = re.compile(r"\\\{\{\}|\{[^}]*\}|\\h")  # FFmpeg writes a brace that is text as \{{}
_INVISIBLE = re.compile(r"[\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff]")
_TAG = re.compile(r"</?(?:[bcisuv]|font|span|ruby|rt)\b[^>]*>")  # those that FFmpeg leaves, as in mov_text
_NOTE = re.compile(r"\[[^]]*\]|［[^］]*］|【[^】]*】|[♩-♯]")
_NOTE_LINE = re.compile(r"[-–—]?\s*(\([^()]*\)|（[^（）]*）|\*[^*]+\*)")
_DASH = re.compile(r"^[-–—]\s*(?=[^\W\d])")
_HIGH_PAIR = re.compile(rb"[\x81-\xfe][\x80-\xfe]")
_HIGH_BYTE = re.compile(rb"[\x80-\xff]")


class Subtitle(NamedTuple):
    """What is said, and where it was found."""

    text: str
    source: str
    """One of SOURCES; "" where none has a word."""


class Caption(NamedTuple):
    """One appearance on the screen; times in seconds."""

    start: float
    end: float
    text: str
    """As in an ASS event: override codes in braces, lines parted by \\N."""


def subtitle_of(path: str | Path, sources: Sequence[str], transcribe: Transcribe | None = None) -> Subtitle:
    """The subtitle of a clip that has none in its annotations: from the first of the sources that has a word of it.

    Args:
        path: the video.
        sources: any of SOURCES, in the order in which they are tried: `file` beside the video, `track` of it, `speech`.
        transcribe: what listens to `speech`: a `Recogniser`'s.

    Raises:
        UserError: a source that is none, `speech` without what listens, or a file or track that cannot be read.
    """
    check_subtitle_sources(sources, transcribe)
    readers = {"file": _beside, "track": read_subtitle_track, "speech": lambda path: _heard(path, transcribe)}
    for source in sources:
        if text := readers[source](path):
            return Subtitle(text, source)
    return Subtitle("", "")


def check_subtitle_sources(sources: Sequence[str], transcribe: Transcribe | None = None) -> tuple[str, ...]:
    """Return the sources. Raises UserError for an unknown one, or `speech` without what listens."""
    for source in sources:
        if source not in SOURCES:
            raise UserError(f"no source of subtitles: {source!r}; give any of {', '.join(SOURCES)}")
        if source == "speech" and transcribe is None:
            raise UserError("subtitles from speech need a model of Whisper; name one, or leave out the source 'speech'")
    return tuple(sources)


def find_subtitle_file(video: str | Path) -> Path | None:
    """The subtitle file beside a video: of its name, or of this and a language, as in clip.srt and clip.en.vtt."""
    video = Path(video)
    names = (f"{video.stem}{language}{suffix}" for language in LANGUAGES for suffix in FORMATS)
    return next((path for name in names if (path := video.with_name(name)).is_file()), None)


def read_subtitle_file(path: str | Path) -> str:
    """What a .srt, .vtt, .ass or .ssa file says; "" where there are no words in it.

    Text is UTF-8 or UTF-16, with or without a byte order mark; what is neither is GB18030 where it looks like
    Chinese, and Windows-1252 or Latin-1 otherwise.

    Raises:
        UserError: not such a file, or it cannot be read.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"not a subtitle file: {path}; give one of {', '.join(FORMATS)}")
    if not path.is_file():
        raise UserError(f"no such file: {path}; check the path")
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror}): {path}; check its permissions") from error
    if len(data) > LARGEST:
        raise UserError(f"more than {LARGEST // 2**20} MiB, hardly subtitles: {path}; remove it or give another file")
    text = _decode(data)
    if not text.strip():
        return ""
    kind = "webvtt" if text.startswith("WEBVTT") else FORMATS[path.suffix.lower()]  # some are named .srt
    av = import_av()
    try:
        with av.open(io.BytesIO(text.encode("utf-8")), format=kind) as container:
            captions = list(_captions(container, container.streams.subtitles[0]))
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise UserError(f"not subtitles, or damaged: {path}; mend it or remove it") from error
    if not captions:
        raise UserError(f"no caption with its times: {path}; mend it or remove it")
    return plain_text(captions)


def read_subtitle_track(path: str | Path) -> str | None:
    """What the text subtitles inside a video say; None where it has none.

    Of several tracks it is the one marked as default, then the first; tracks of forced captions, which leave out most
    of what is said, come last. Subtitles that are images are passed over.

    Raises:
        UserError: PyAV is not installed, there is no such file, or it cannot be read.
    """
    with open_media(path) as container:
        tracks = [track for track in container.streams.subtitles if _is_text(track)]
        if not tracks:
            return None
        disposition = import_av().stream.Disposition
        order = lambda track: (
            bool(track.disposition & disposition.forced),
            not track.disposition & disposition.default,
            track.index,
        )
        try:
            return plain_text(_captions(container, min(tracks, key=order)))
        except import_av().FFmpegError as error:
            raise damaged(path) from error


class Recogniser:
    """Writes down speech with Whisper, by faster-whisper.

    Nothing is sampled, so that the same sound gives the same words; silence is cut out before, since Whisper makes up
    words for it.
    """

    def __init__(self, model: str | Path, *, language: str | None = None, device: str = "auto"):
        """
        Args:
            model: a folder with a model converted for faster-whisper; or the name of one, such as small.en, which
                is downloaded unless it is there already.
            language: as in "en" or "zh"; None listens which it is.
            device: auto, cpu or cuda.

        Raises:
            UserError: faster-whisper is not installed, or the model is not there or cannot be loaded.
        """
        try:
            import ctranslate2
            import faster_whisper
        except ImportError as error:
            raise UserError("subtitles from speech need faster-whisper; pip install 'emollama_jax[asr]'") from error
        folder = Path(model)
        if folder.is_dir():
            if lacks := [name for name in MODEL_FILES if not (folder / name).exists()]:
                raise UserError(f"no model of faster-whisper: {folder} lacks {', '.join(lacks)}; give another folder")
        elif str(model) not in faster_whisper.available_models():
            names = ", ".join(faster_whisper.available_models())
            raise UserError(f"no model of Whisper: {model}; give a folder, or one of {names}")
        if device == "auto":
            device = "cuda" if ctranslate2.get_cuda_device_count() else "cpu"
        compute = "float32" if device == "cpu" else "default"  # CPUs convert float16, and remark on it
        try:
            self._model = faster_whisper.WhisperModel(
                str(model), device=device, compute_type=compute, local_files_only=folder.is_dir()
            )
        except Exception as error:  # the hub, the network and CTranslate2 each have their own kinds
            raise UserError(f"cannot load Whisper model {model} ({first_line(error)}); give another") from error
        self._language = language

    def transcribe(self, waveform: Float[np.ndarray, " S"]) -> str:
        """The words in 16 kHz mono sound, float32 from -1 to 1; "" where nobody speaks."""
        if not len(waveform):
            return ""
        segments, _ = self._model.transcribe(
            waveform,
            language=self._language,
            temperature=0.0,
            condition_on_previous_text=False,  # a mistake would be carried on
            vad_filter=True,
        )
        return plain_text(Caption(segment.start, segment.end, segment.text) for segment in segments)


def plain_text(captions: Iterable[Caption]) -> str:
    """One line of what the captions say, as the module's docstring has it."""
    said: list[str] = []
    end = -np.inf
    for caption in sorted(captions, key=lambda caption: caption.start):
        lines = list(_lines(caption.text))
        if caption.start - end < PAUSE_S:
            _roll_on(said, lines)
        else:
            said += lines
        end = max(end, caption.end)
    return " ".join(said)


def _lines(text: str) -> Iterator[str]:
    """The lines of a caption that have words, without what is no words."""
    text = _DRAWING.sub("", text)
    for line in re.split(r"\\[Nn]|\n", text):
        line = _ESCAPES.sub(lambda found: {r"\{{}": "{", r"\h": " "}.get(found[0], ""), line)
        line = html.unescape(_TAG.sub("", _INVISIBLE.sub("", line)))
        line = " ".join(_NOTE.sub(" ", line).split())
        if re.search(r"\w", line) and not _NOTE_LINE.fullmatch(line):
            yield _DASH.sub("", line)


def _roll_on(said: list[str], lines: list[str]) -> None:
    """Adds the lines but for those at their beginning that ended `said`; one that grew takes the place of itself."""
    for count in range(min(len(said), len(lines)), 0, -1):
        if said[-count:] == lines[:count]:
            said += lines[count:]
            return
        if said[-count:-1] == lines[: count - 1] and lines[count - 1].startswith(f"{said[-1]} "):
            said[-1:] = lines[count - 1 :]
            return
    said += lines


def _captions(container, track) -> Iterator[Caption]:
    """The captions of a track of an open container, in the order in which they are stored."""
    for packet in read_packets(container, track):
        found = track.decode2(packet) if packet.pts is not None else None
        for rect in found or ():
            if rect.type == b"ass":
                start, length = (float((time or 0) * packet.time_base) for time in (packet.pts, packet.duration))
                event = rect.ass.decode("utf-8", "replace")
                yield Caption(start, start + length, event.split(",", 8)[-1])


def _is_text(track) -> bool:
    return track.codec_context is not None and track.codec_context.codec.text_sub


def _decode(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    if b"\0" in data:  # text has none: the upper halves of ASCII
        even, odd = (data[side::2].count(0) for side in (0, 1))
        return data.decode("utf-16-be" if even > odd else "utf-16-le", "replace")
    in_pairs = 2 * len(_HIGH_PAIR.findall(data)) > len(_HIGH_BYTE.findall(data)) / 2
    for encoding in ("utf-8-sig", *(["gb18030"] if in_pairs else []), "cp1252"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1")


def _beside(video: str | Path) -> str | None:
    path = find_subtitle_file(video)
    return path and read_subtitle_file(path)


def _heard(video: str | Path, transcribe: Transcribe) -> str | None:
    sound = read_sound(video)
    return None if sound is None else transcribe(sound)
