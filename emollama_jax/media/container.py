"""Media files opened and decoded as far as they can be (PyAV)."""

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from emollama_jax.errors import UserError

MAX_PIXELS = 100_000_000
"""Of a frame: more is a damaged header, or a memory bomb."""

# What people record and keep. FFmpeg knows more, among them play lists that open other files and addresses, and plain
# text drawn as a terminal would.
FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,mxf,rm,dv,nut,ivf,yuv4mpegpipe,h264,hevc,m4v,mpegvideo,obu,mjpeg,"
    "gif,apng,image2,png_pipe,jpeg_pipe,bmp_pipe,tiff_pipe,webp_pipe,wav,w64,aiff,caf,au,mp3,flac,aac,ac3,amr,ape"
)


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
            metadata_errors="replace",
        )
    except PermissionError as error:
        raise UserError(f"may not be read: {path}; check its permissions") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        raise damaged(path) from error
    if not container.streams:
        container.close()
        raise damaged(path)
    return container


def damaged(path: str | Path) -> UserError:
    """What is said of a file that cannot be decoded."""
    return UserError(f"not a video, or damaged or cut short: {path}; copy it again or leave it out")


def video_streams(container) -> list:
    """The streams of moving pictures, the best first: the one that the file marks as default, then the largest.

    Cover pictures are none.
    """
    disposition = import_av().stream.Disposition
    covers = disposition.attached_pic | disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    pixels = lambda stream: stream.codec_context.width * stream.codec_context.height if stream.codec_context else 0
    return sorted(streams, key=lambda stream: (not stream.disposition & disposition.default, -pixels(stream)))


def read_packets(container, stream) -> Iterator:
    """The packets of a stream in the order of the file, up to its end or to where it cannot be read on."""
    av = import_av()
    try:
        for packet in container.demux(stream):
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
            frames = stream.decode(packet)
        except av.FFmpegError:
            if strict:
                raise
            continue
        yield from frames
