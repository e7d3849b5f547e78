"""What `extract` and `predict` share: where the words of a clip are looked for."""

import argparse

from emollama_jax.errors import UserError
from emollama_jax.media.subtitles import SOURCES, Recogniser, Transcribe


def add_subtitle_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--subtitles-from",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar=",".join(SOURCES),
        help="where to look, in this order, for the words of a clip whose list has none",
    )
    parser.add_argument(
        "--subtitle-language",
        default="",
        metavar="LANGUAGE",
        help="of subtitle files and tracks, as in en: others are passed over (default: any; untagged, English, Chinese "
        "before others)",
    )
    parser.add_argument("--recogniser", metavar="MODEL", help="what hears speech: a faster-whisper model or its folder")


def check_subtitle_arguments(arguments: argparse.Namespace) -> None:
    """Raises UserError for unknown sources, or speech without a recogniser."""
    if unknown := [source for source in arguments.subtitles_from if source not in SOURCES]:
        raise UserError(f"--subtitles-from: no source {unknown[0]!r}; choose among {', '.join(SOURCES)}")
    if arguments.subtitle_language and not {"file", "track"} & {*arguments.subtitles_from}:
        raise UserError("--subtitle-language: goes with --subtitles-from file or track, and only there")
    if ("speech" in arguments.subtitles_from) != bool(arguments.recogniser):
        raise UserError("--recogniser: goes with --subtitles-from speech, and only there")


def transcribe_of(arguments: argparse.Namespace) -> Transcribe | None:
    """What listens, where speech is to be heard."""
    return Recogniser(arguments.recogniser).transcribe if arguments.recogniser else None
