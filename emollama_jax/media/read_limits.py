"""What reading a stranger's clip may take: memory, time, and pictures that are counted before any is decoded."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from emollama_jax.errors import UserError
from emollama_jax.media.container import open_media, read_packets, video_streams

try:
    import resource
except ImportError:  # no POSIX
    resource = None


class ReadLimits(NamedTuple):
    """What a child process may use for a clip."""

    seconds: float = 60.0
    """Of work, after which it is ended."""
    memory_mib: int = 6144
    pixels: float = 2e10
    """Of all pictures of a stream together, width x height x number: two minutes in 4K, or five at 1080p and 30/s."""


@contextlib.contextmanager
def memory_limited(limits: ReadLimits) -> Iterator[None]:
    """Within the block this process gets no more memory than that; it is to be a child that reads clips."""
    if resource is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    least = limits.memory_mib << 20
    resource.setrlimit(resource.RLIMIT_DATA, (least if hard == resource.RLIM_INFINITY else min(least, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def check_pictures(path: Path, limits: ReadLimits, max_seconds: float) -> None:
    """Count the pictures of a file and how long they last by its packets; none is decoded.

    Raises:
        UserError: they are more than the limits allow, or the file cannot be opened.
    """
    with open_media(path) as container:
        streams = {stream.index: stream for stream in video_streams(container) if stream.codec_context}
        counts, ends = dict.fromkeys(streams, 0), {}
        for packet in read_packets(container, *streams.values()) if streams else ():
            counts[packet.stream_index] += 1
            if packet.pts is not None:
                begin, end = ends.get(packet.stream_index, (packet.pts, packet.pts))
                ends[packet.stream_index] = min(begin, packet.pts), max(end, packet.pts)
        for index, stream in streams.items():
            begin, end = ends.get(index, (0, 0))
            seconds = float((end - begin) * stream.time_base) if stream.time_base else 0.0
            if seconds > max_seconds:
                raise UserError(f"{path}: {seconds:.0f} s, more than {max_seconds:g} s; cut it into clips")
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height * counts[index] > limits.pixels:
                what = f"{counts[index]} pictures of {width} x {height}"
                raise UserError(f"{path}: {what}, over {limits.pixels:.0e} pixels in all; make it smaller or shorter")
