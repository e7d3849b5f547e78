"""The subtitle files beside a video, by their names: clip.srt, clip.mp4.srt, clip.en-US.VTT, clip.zh.forced.ass."""

import os
import re
import unicodedata
from pathlib import Path

from emollama_jax.media.container import VIDEO_SUFFIXES

FORMATS = {".srt": "srt", ".vtt": "webvtt", ".ass": "ass", ".ssa": "ass"}  # suffix -> FFmpeg's name, best first
FLAGS = ("forced", "sdh", "cc", "hi", "default")  # of a file, beside its language; hi is also Hindi
PREFERRED = ("en", "zh")  # among languages, where none is asked for

# ISO 639-2 and the languages' names -> ISO 639-1. A language that is not here is known by its own tag alone.
LANGUAGES = {
    code: language
    for language, codes in {
        "ar": "ara arabic",
        "cs": "ces cze czech",
        "da": "dan danish",
        "de": "deu ger german deutsch",
        "el": "ell gre greek",
        "en": "eng english",
        "es": "spa spanish espanol",
        "fa": "fas per persian",
        "fi": "fin finnish",
        "fr": "fra fre french francais",
        "he": "heb hebrew",
        "hi": "hin hindi",
        "hu": "hun hungarian",
        "id": "ind indonesian",
        "it": "ita italian",
        "ja": "jpn japanese",
        "ko": "kor korean",
        "nl": "nld dut dutch",
        "no": "nor norwegian",
        "pl": "pol polish",
        "pt": "por portuguese",
        "ro": "ron rum romanian",
        "ru": "rus russian",
        "sv": "swe swedish",
        "th": "tha thai",
        "tr": "tur turkish",
        "uk": "ukr ukrainian",
        "vi": "vie vietnamese",
        "zh": "zho chi chs cht chinese cmn",
    }.items()
    for code in codes.split()
}

_TAG = re.compile(r"[a-z]{2,10}([-_][a-z0-9]{1,8})*")


def find_subtitle_files(video: str | Path, language: str = "") -> list[Path]:
    """The subtitle files beside a video, in the order in which they are tried.

    Their names are the video's, with or without its suffix, then a language tag and flags such as `forced`, if any, and
    one of FORMATS; in capitals too. Without a language to look for they come as: no tag, English, Chinese, others by
    name; with one, those in it and then those without a tag, and no others. Forced ones, which leave out most of what
    is said, come last; equals in the order of FORMATS.
    """
    video = Path(video)
    names = _names_beside(video)
    places = {name: place for name in names if (place := _place(name, video.name, names, language)) is not None}
    return [video.with_name(names[name]) for name in sorted(places, key=places.get)]


def language_rank(tag: str, language: str = "") -> int | None:
    """The place of a language tag in the order of `find_subtitle_files`; None for one that is not taken."""
    tag = main_language(tag)
    if language:
        return {main_language(language): 0, "": 1}.get(tag)
    return ("", *PREFERRED, tag).index(tag)


def main_language(tag: str) -> str:
    """A tag's language: "en" of "en-US", "eng" and "English"; "" of none, as `und` is."""
    main = re.split("[-_]", tag.lower())[0]
    return "" if main in ("und", "unk", "mis") else LANGUAGES.get(main, main)


def _names_beside(video: Path) -> dict[str, str]:
    """The names of videos and subtitle files that begin as a video's does, composed (NFC) -> as they are."""
    begin = _composed(video.name).split(".")[0].casefold()
    kinds = {*FORMATS, *VIDEO_SUFFIXES}
    try:
        names = os.listdir(video.parent)
    except OSError:
        return {}
    beside = {_composed(name): name for name in sorted(names) if os.path.splitext(name)[1].lower() in kinds}
    return {name: own for name, own in beside.items() if name.split(".")[0].casefold() == begin}


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _place(name: str, video: str, names: dict[str, str], language: str) -> tuple | None:
    """A subtitle file's place in the order, or None where it is not this video's."""
    base, suffix = os.path.splitext(name)
    if suffix.lower() not in FORMATS:
        return None
    video = _composed(video)
    stem = os.path.splitext(video)[0]
    for own in (video, stem):
        rest = base[len(own) :]
        if base[: len(own)].casefold() == own.casefold() and (not rest or rest.startswith(".")):
            break
    else:
        return None
    if _is_of_another(base, rest, video, stem, names):
        return None
    words = rest.lower().split(".")[1:]
    tag = words.pop(0) if words and (words[0] not in FLAGS or words[0] == "hi") else ""
    if (tag and not _TAG.fullmatch(tag)) or not set(words) <= set(FLAGS):
        return None
    if (rank := language_rank(tag, language)) is None:
        return None
    exact = base.startswith(own)
    return "forced" in words, not exact, rank, tag, [*FORMATS].index(suffix.lower()), name


def _is_of_another(base: str, rest: str, video: str, stem: str, names: dict[str, str]) -> bool:
    """Whether another video's name fits better: clip.one.mp4 for clip.one.srt, or one in the same capitals."""
    others = {os.path.splitext(name)[0] for name in names if os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES}
    others -= {stem}
    start = base[: len(base) - len(rest)]
    return any(base == other or (base.startswith(f"{other}.") and len(other) > len(stem)) for other in others) or (
        start not in (video, stem) and start in others
    )
