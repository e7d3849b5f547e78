"""Media files opened and decoded as far as they can be (PyAV)."""

import ctypes
import importlib.metadata
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from emollama_jax.errors import UserError
from emollama_jax.io.worker_pool import WorkerDied

# Of files that are taken for videos in a folder; a file that is named itself is opened whatever its suffix is. Of files
# that differ in the suffix alone the first is taken.
VIDEO_SUFFIXES = (
    *(".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".mts", ".m2ts", ".ts", ".vob", ".3gp", ".3g2"),
    *(".wmv", ".asf", ".flv", ".f4v", ".ogv", ".mxf", ".rm", ".rmvb", ".dv", ".m2v", ".qt", ".divx", ".nut"),
)

MAX_PIXELS = 100_000_000
"""Of a frame: more is a damaged header, or a memory bomb."""

# What people record and keep. FFmpeg knows more, among them play lists that open other files and addresses, and plain
# text drawn as a terminal would.
FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,mxf,rm,dv,nut,ivf,yuv4mpegpipe,h264,hevc,m4v,mpegvideo,obu,mjpeg,"
    "gif,apng,image2,png_pipe,jpeg_pipe,bmp_pipe,tiff_pipe,webp_pipe,wav,w64,aiff,caf,au,mp3,flac,aac,ac3,amr,ape"
)


class DecodeError(UserError):
    """Pictures or sound that cannot be decoded, in a file that is there."""


def import_av():
    """The package av. Raises UserError where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError("videos need PyAV; pip install 'emollama_jax[media]'") from error
    return av


def open_media(path: str | Path):
    """An `av.container.InputContainer`; a context manager.

    Raises:
        UserError: PyAV is not installed, there is no such file, it may not be read, or is of no kind that has pictures
            or sound.
    """
    av = import_av()
    if not os.path.isfile(path):  # a named pipe would wait for ever
        if not os.path.lexists(path) or os.path.islink(path):
            raise UserError(f"no such file: {path}; check the path")
        raise UserError(f"not a file: {path}; give a video")
    try:
        # An absolute path, as FFmpeg takes what stands before a colon for a protocol.
        container = av.open(
            os.path.abspath(path),
            # A still's name is that of one file, not the pattern of many.
            options={"format_whitelist": FORMATS, "max_pixels": str(MAX_PIXELS), "pattern_type": "none"},
            **_lenient(av),
        )
    except PermissionError as error:
        raise UserError(f"may not be read: {path}; check its permissions") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        raise damaged(path) from error
    if not container.streams:
        container.close()
        raise damaged(path)
    return container


def _lenient(av) -> dict[str, str]:
    """The option by which PyAV up to 18 takes metadata that are not UTF-8; later ones do anyway."""
    return {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


def damaged(path: str | Path) -> DecodeError:
    """What is said of a file that cannot be decoded."""
    return DecodeError(f"not a video, or damaged or cut short: {path}; copy it again or leave it out")


def decoder_fault(died: WorkerDied) -> str:
    """What ended a process that decoded a clip, and the remedy."""
    if died.signal in ("SIGKILL", "SIGTERM"):
        return f"{died}, as the system ends one for want of memory; free some, or cut the clip"
    version = importlib.metadata.version("av")
    return f"{died}, a fault of PyAV {version} or a library in it; write the clip anew with ffmpeg, or leave it out"


def video_streams(container) -> list:
    """The streams of moving pictures, the best first: the one that the file marks as default, then the largest.

    Cover pictures are none.
    """
    disposition = import_av().stream.Disposition
    covers = disposition.attached_pic | disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    pixels = lambda stream: stream.codec_context.width * stream.codec_context.height if stream.codec_context else 0
    return sorted(streams, key=lambda stream: (not stream.disposition & disposition.default, -pixels(stream)))


def audio_streams(container) -> list:
    """The streams of sound, the best first: the one that the file marks as default, then in its order.

    Those with other words than the people in the picture say, such as commentaries, or with none, come last.
    """
    disposition = import_av().stream.Disposition
    beside = disposition.comment | disposition.descriptions | disposition.visual_impaired | disposition.clean_effects
    order = lambda stream: (
        bool(stream.disposition & beside),
        not stream.disposition & disposition.default,
        stream.index,
    )
    return sorted(container.streams.audio, key=order)


def read_packets(container, *streams) -> Iterator:
    """The packets of streams in the order of the file, up to its end or to where it cannot be read on."""
    av = import_av()
    try:
        for packet in container.demux(*streams):
            if packet.size:  # an empty one would end the decoding
                yield packet
    except (av.FFmpegError, OSError):
        return


def decode(stream, packets: Iterable, strict: bool = False) -> Iterator:
    """The frames of those packets that can be decoded, in the order in which they are shown.

    Args:
        strict: what cannot be decoded is an `av.FFmpegError`.
    """
    av = import_av()
    if stream.codec_context is None:  # of a codec that FFmpeg does not know
        return
    for packet in itertools.chain(packets, [None]):  # at the end come those that the decoder held back
        try:
            frames = [_with_layout_kept(frame) for frame in stream.decode(packet)]
        except av.FFmpegError:
            if strict:
                raise
            continue
        yield from frames


def _with_layout_kept(frame):
    """The frame, whose channel layout PyAV 18 no longer frees.

    PyAV from 17.1 up to 19, which needs Python 3.12, frees a list of channels that belongs to the frame: where channels
    are in an order of the file's own ("2 channels (FR+FL)") the process would end. An object of PyAV's that is never
    given up costs less.
    """
    layout = getattr(frame, "layout", None)
    if layout is not None and "(" in layout.name and int(import_av().__version__.split(".")[0]) < 19:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(layout))
    return frame
