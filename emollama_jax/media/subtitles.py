"""What is said in a clip, as one line of plain text: out of a subtitle file, a track of the video, or its sound.

FFmpeg reads the files as it reads the tracks, so that both mean the same. What becomes of a caption:

    its place in time      captions are put in order and joined by spaces
    styles and positions   left out, and so are drawings, marked as such or not, and comments in braces
    [music], [laughs]      left out wherever they stand, as notes of what is heard beside the words
    (laughs), *sighs*      left out where they are all of a line; within one, somebody may say them
    ♪ la la ♪              the words without the notes
    - Who? - Me.           the words without the dashes that begin a line
    MARY: who?             as it stands: a name and a word that is said look alike
    a line once more       said once, where no pause lies between: captions that roll or grow repeat what is still
                           on the screen. After a pause it is said again.

Axes: S samples.
"""

import functools
import html
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from emollama_jax.errors import UserError, first_line
from emollama_jax.io.text_encoding import decode_text
from emollama_jax.media.audio import read_sound
from emollama_jax.media.container import damaged, import_av, open_media, read_packets
from emollama_jax.media.subtitle_files import FORMATS, find_subtitle_files, language_rank

SOURCES = ("file", "track", "speech")
LARGEST = 2**24  # bytes of a subtitle file; those of films have less than a hundredth
MODEL_FILES = ("model.bin", "config.json", "tokenizer.json")  # a folder without the last would have it downloaded
PAUSE_S = 0.1  # captions closer than this roll on

Transcribe = Callable[[Float[np.ndarray, " S"]], str]

_BRACES = re.compile(r"(\\\{\{\}|\{[^}]*\})")  # FFmpeg writes a brace that is text as \{{}
_ESCAPES = re.compile(rf"{_BRACES.pattern}|\\h")
_DRAWING = re.compile(r"m( -?[\d.]+){2}( [mnlbspc]( -?[\d.]+)*)+")  # a line that can be nothing else: m x y l x y ...
_INVISIBLE = re.compile(r"[\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff]")
_TAG = re.compile(r"</?(?:[bcisuv]|font|span|ruby|rt)\b[^>]*>")  # those that FFmpeg leaves, as in mov_text
_NOTE = re.compile(r"\[[^]]*\]|［[^］]*］|【[^】]*】|[♩-♯]")
_NOTE_LINE = re.compile(r"[-–—]?\s*(\([^()]*\)|（[^（）]*）|\*[^*]+\*)")
_DASH = re.compile(r"^[-–—]\s*(?=[^\W\d])")


class Subtitle(NamedTuple):
    """What is said, and where it was found."""

    text: str
    source: str
    """One of SOURCES; "" where none has a word."""
    notes: tuple[str, ...] = ()
    """What could not be read on the way, or was left out."""


class Caption(NamedTuple):
    """One appearance on the screen; times in seconds."""

    start: float
    end: float
    text: str
    """As in an ASS event: override codes in braces, lines parted by \\N."""


def subtitle_of(
    path: str | Path,
    sources: Sequence[str],
    transcribe: Transcribe | None = None,
    *,
    language: str = "",
    span: tuple[float, float] | None = None,
) -> Subtitle:
    """The subtitle of a clip that has none in its annotations: from the first of the sources that has a word of it.

    A file or track that cannot be read, or has no word, is passed over.

    Args:
        path: the video.
        sources: any of SOURCES, in the order in which they are tried: `file` beside the video, `track` of it, `speech`.
        transcribe: what listens to `speech`: a `Recogniser`'s.
        language: of files and tracks: see `find_subtitle_files`.
        span: when the clip begins by the clock of its file, and how long it lasts, in seconds: captions beyond are left
            out; None takes all.

    Raises:
        UserError: a source that is none, `speech` without what listens, or sound that cannot be read.
    """
    check_subtitle_sources(sources, transcribe)
    notes: list[str] = []
    for source in sources:
        if source == "speech":
            text = _heard(path, transcribe)
        else:
            readers = _file_readers(path, language) if source == "file" else _track_readers(path, language)
            text = _first_text(readers, span and (span if source == "track" else (0.0, span[1])), notes)
        if text:
            return Subtitle(text, source, tuple(notes))
    return Subtitle("", "", tuple(notes))


def check_subtitle_sources(sources: Sequence[str], transcribe: Transcribe | None = None) -> tuple[str, ...]:
    """Return the sources. Raises UserError for an unknown one, or `speech` without what listens."""
    for source in sources:
        if source not in SOURCES:
            raise UserError(f"no source of subtitles: {source!r}; give any of {', '.join(SOURCES)}")
        if source == "speech" and transcribe is None:
            raise UserError("subtitles from speech need a model of Whisper; name one, or leave out the source 'speech'")
    return tuple(sources)


Reader = tuple[str, Callable[[], list[Caption]]]  # what it reads, for messages


def _first_text(readers: Iterable[Reader], span: tuple[float, float] | None, notes: list[str]) -> str:
    """The first text of what can be read."""
    for name, read in readers:
        try:
            captions = read()
        except UserError as error:
            notes.append(str(error))
            continue
        within = [c for c in captions if span is None or c.end > span[0] and c.start < sum(span)]
        if text := plain_text(within):
            if without := len(captions) - len(within):
                notes.append(f"{name}: {without} of {len(captions)} captions lie beyond the clip's {span[1]:.1f} s")
            return text
        if captions and not within:
            notes.append(f"{name}: all of its {len(captions)} captions lie beyond the clip's {span[1]:.1f} s")
    return ""


def _file_readers(video: str | Path, language: str) -> list[Reader]:
    return [(path.name, functools.partial(_file_captions, path)) for path in find_subtitle_files(video, language)]


def _track_readers(video: str | Path, language: str) -> list[Reader]:
    """Of the tracks of text inside a video, those in the language first; of equals the one marked as default, then in
    their order. Tracks of forced captions, which leave out most of what is said, come last; subtitles that are images
    are left out."""
    forced, default = (getattr(import_av().stream.Disposition, name) for name in ("forced", "default"))
    found = []
    with open_media(video) as container:
        for track in container.streams.subtitles:
            rank = language_rank(track.metadata.get("language", ""), language)
            if rank is not None and track.codec_context is not None and track.codec_context.codec.text_sub:
                by_language = rank if language else 0
                order = bool(track.disposition & forced), by_language, not track.disposition & default, track.index
                found.append((order, track.index))
    name = Path(video).name
    return [(f"{name}, track {i}", functools.partial(_track_captions, video, i)) for _, i in sorted(found)]


def _file_captions(path: Path) -> list[Caption]:
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror}): {path}; check its permissions") from error
    if len(data) > LARGEST:
        raise UserError(f"more than {LARGEST // 2**20} MiB, hardly subtitles: {path}; remove it or give another file")
    text = decode_text(data, "ignore")
    if not text.strip():
        return []
    kind = "webvtt" if text.startswith("WEBVTT") else FORMATS[path.suffix.lower()]  # some are named .srt
    av = import_av()
    try:
        with av.open(io.BytesIO(text.encode("utf-8")), format=kind) as container:
            captions = list(_captions(container, container.streams.subtitles[0]))
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise UserError(f"not subtitles, or damaged: {path}; mend it or remove it") from error
    if not captions:
        raise UserError(f"no caption with its times: {path}; mend it or remove it")
    return captions


def _track_captions(path: str | Path, index: int) -> list[Caption]:
    with open_media(path) as container:
        try:
            return list(_captions(container, container.streams[index]))
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
    text = _without_drawings(text)
    for line in re.split(r"\\[Nn]|\n", text):
        line = _ESCAPES.sub(lambda found: {r"\{{}": "{", r"\h": " "}.get(found[0], ""), line)
        line = html.unescape(_TAG.sub("", _INVISIBLE.sub("", line)))
        line = " ".join(_NOTE.sub(" ", line).split())
        if re.search(r"\w", line) and not _NOTE_LINE.fullmatch(line) and not _DRAWING.fullmatch(line):
            yield _DASH.sub("", line)


def _without_drawings(text: str) -> str:
    """The text but for what stands between \\p1 and \\p0."""
    pieces, drawing = [], False
    for piece in _BRACES.split(text):
        if piece.startswith("{"):
            if modes := re.findall(r"\\p(\d+)", piece):
                drawing = int(modes[-1]) > 0
        elif drawing:
            continue
        pieces.append(piece)
    return "".join(pieces)


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


def _heard(video: str | Path, transcribe: Transcribe) -> str | None:
    sound = read_sound(video)
    return None if sound is None else transcribe(sound)
