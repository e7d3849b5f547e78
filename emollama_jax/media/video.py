"""Frames of a video, by number and by time.

A frame's number is its place in the order in which frames are shown, and its time is counted from the first that can be
decoded: packets before it count as little as if they were not there. Where a later packet cannot be decoded, its number
means the frame that is shown then: the one before.

Axes: n frames, H x W pixels.
"""

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from emollama_jax.errors import UserError
from emollama_jax.media import container as media
from emollama_jax.media.timeline import Timeline, read_timeline
from emollama_jax.media.tone_mapping import is_hdr, to_sdr

MIN_JUMP = 32
"""Frames. Over a shorter gap decoding goes on; it is more than any decoder holds back, so that a jump goes ahead."""
WITHOUT_TIMES = ("avi",)
"""Formats that know when a frame is decoded, but not when it is shown."""


class Video:
    """An open video file; a context manager.

    Attributes:
        times: f64 [n], when each frame is shown, in seconds from the first, ascending; read from the packets.
        duration: seconds from the first frame to the end of the last.
        size: (width, height) of the frames as they are meant to be seen: upright, and with square pixels.
        timeline: of the file, with the first frame as its origin.
    """

    times: Float[np.ndarray, " n"]
    duration: float
    size: tuple[int, int]
    timeline: Timeline

    def __init__(self, path: str | Path):
        """Reads the packets of the file, and decodes the first frame of the best stream that has one.

        Raises:
            UserError: no such file, PyAV is not installed, no frame can be decoded, or frames are too large.
        """
        self._path = path
        self._container = media.open_media(path)
        try:
            self._choose_stream()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Closes the file, and ends a pass over its frames."""
        self._container.close()

    @property
    def num_frames(self) -> int:
        """How many frames the packets say there are; the last of them may be damaged."""
        return len(self.times)

    def frames(self, indices: Sequence[int]) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """The RGB frames of these numbers, of `size`, in one pass that keeps one of them in memory.

        A new pass ends the one before it.

        Args:
            indices: ascending; a number may come several times, and one beyond the last frame gives the last.
        """
        indices = [min(index, self.num_frames - 1) for index in indices]
        if indices != sorted(indices) or min(indices, default=0) < 0:
            raise ValueError("give ascending numbers of frames, from 0")
        return map(self._pixels, self._frames(indices))

    def _choose_stream(self):
        streams = media.video_streams(self._container)
        if not streams:
            raise UserError(f"no moving picture in: {self._path}; give a video")
        self.timeline = read_timeline(self._container)
        tables = [self.timeline.tables.get(stream.index) for stream in streams]
        counts = {stream.index: len(table.keys) if table else 0 for stream, table in zip(streams, tables, strict=True)}
        # A single picture beside a video is its cover, whatever the file calls it.
        for index in sorted(counts, key=lambda index: counts[index] == 1):
            self._reopen()
            self._index = index
            if counts[index] and self._scan():
                return
        raise self._no_frame([table for table in tables if table])

    def _no_frame(self, tables) -> UserError:
        if any(stream.codec_context and stream.codec_context.width for stream in self._container.streams.video):
            return media.damaged(self._path)
        if any(len(table.keys) for table in tables) and not any(any(table.keys) for table in tables):
            return media.DecodeError(
                f"{self._path}: no key frame, without which no picture can be decoded; "
                "cut the clip so that it begins with one, or leave it out"
            )
        limit = media.MAX_PIXELS // 10**6
        return UserError(f"{self._path}: no size of its frames, or over {limit} million pixels; make it smaller")

    def _reopen(self):
        self._container.close()
        self._container = media.open_media(self._path)

    def _stream(self, strict: bool = False):
        """The stream. Its decoder refuses what is too large and, where it is strict, whatever is damaged."""
        stream = self._container.streams[self._index]
        if stream.codec_context is not None:
            self._check_size(stream.codec_context.width, stream.codec_context.height)
            options = {"max_pixels": str(media.MAX_PIXELS)}
            stream.codec_context.options = options | ({"err_detect": "explode"} if strict else {})
        return stream

    def _check_size(self, width: int, height: int):
        if width * height > media.MAX_PIXELS:
            limit = media.MAX_PIXELS // 10**6
            raise UserError(f"{self._path}: frames of {width} x {height}, over {limit} million pixels; make it smaller")

    def _scan(self) -> bool:
        """Decodes one frame of the stream, and numbers those from it on. Whether there is one."""
        stream = self._stream()
        first = next(media.decode(stream, self._packets(stream)), None)
        if first is None:
            return False
        self._set_shape(stream, first)
        table = self.timeline.tables[self._index]
        timed = table.timed and self._container.format.name not in WITHOUT_TIMES
        stamps, decoded = self.timeline.times(self._index)
        stamps, keys = stamps if timed else decoded, np.array(table.keys, bool)
        shown = np.ones(len(stamps), bool)
        if timed and first.pts is not None:
            shown = stamps >= first.pts
        elif first.key_frame and keys.any():
            shown[: keys.argmax()] = False
        order = np.argsort(stamps, kind="stable")
        order = order[shown[order]]
        self._set_times(stream, stamps[order], table.durations[order[-1]])
        # Numbers come from the time stamps where every frame has its own; else frames are counted.
        self._stamps = stamps[order] if timed and np.all(np.diff(stamps[order]) > 0) else None
        trusted = self._stamps is not None and stream.codec_context.name != "apng"  # which marks every frame as one
        self._keys = np.flatnonzero(keys[order]).tolist() if trusted else []
        return True

    def _packets(self, stream) -> Iterator:
        """The packets of the stream from the start of the file, which was just opened, on the file's one clock."""
        return self.timeline.shifted(stream, media.read_packets(self._container, stream))

    def _set_times(self, stream, stamps: np.ndarray, last_duration: int):
        unit = stream.time_base
        if len(stamps) > 1 and stamps[0] == stamps[-1]:  # there are none
            last_duration = max(round(1 / ((stream.average_rate or stream.guessed_rate or 25) * unit)), 1)
            stamps = np.arange(len(stamps)) * last_duration
        self.timeline = self.timeline.with_origin(int(stamps[0]) * unit)
        self.times = (stamps - stamps[0]) * unit.numerator / unit.denominator
        self.duration = float(self.times[-1] + last_duration * unit)

    def _set_shape(self, stream, frame):
        """How the frames become upright and their pixels square."""
        width, height = frame.width, frame.height
        aspect = stream.sample_aspect_ratio or 1
        if aspect > 1:  # pixels are added, none is lost
            width = round(width * aspect)
        else:
            height = round(height / aspect)
        self._check_size(width, height)
        self._stored = width, height
        self._turned, self._mirrored, self._flipped = _turns(frame)
        self.size = (height, width) if self._turned else (width, height)

    def _frames(self, indices: list[int]) -> Iterator:
        """The decoded frames of these numbers: by jumps where all goes well, else from the start of the file.

        What a decoder makes up for damaged parts depends on what it has seen before.
        """
        done = 0
        if self._keys:
            try:
                for frame in self._decoded(indices, jumps=True):
                    yield frame
                    done += 1
                return
            except (media.import_av().FFmpegError, _NoPlaceToBegin):
                pass
        yield from self._decoded(indices[done:], jumps=False)

    def _decoded(self, indices: list[int], jumps: bool) -> Iterator:
        """One pass over the file. One with jumps leaves out what is between a frame and a much later one, and fails
        where anything is damaged."""
        self._reopen()
        stream = self._stream(strict=jumps)
        packets = self._packets(stream)
        coming = self._numbered(media.decode(stream, packets, strict=jumps))
        number, frame, ahead = -1, None, None
        for index in indices:
            key = self._key_before(index) if jumps else 0
            if key - number > MIN_JUMP:
                packets = _from(packets, int(self._stamps[key]))
                stream.codec_context.flush_buffers()
                coming = self._numbered(media.decode(stream, packets, strict=True))
                number, frame = next(coming, (-1, None))
                if number != key or not frame.key_frame or frame.is_corrupt:
                    raise _NoPlaceToBegin
                ahead = None
            while number < index:
                ahead = ahead or next(coming, None)
                if ahead is None or (frame is not None and ahead[0] > index):
                    break
                (number, frame), ahead = ahead, None
            if frame is None:
                raise media.damaged(self._path)
            yield frame

    def _key_before(self, index: int) -> int:
        place = bisect_right(self._keys, index)
        return self._keys[place - 1] if place else 0

    def _numbered(self, frames: Iterator) -> Iterator:
        for count, frame in enumerate(frames):
            if self._stamps is None or frame.pts is None:
                yield count, frame
            else:
                yield max(int(np.searchsorted(self._stamps, frame.pts, side="right")) - 1, 0), frame

    def _pixels(self, frame) -> UInt8[np.ndarray, "H W 3"]:
        width, height = self._stored
        pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
        if is_hdr(int(frame.color_trc)):
            pixels = to_sdr(pixels, int(frame.color_trc), int(frame.color_primaries))
        if self._turned:
            pixels = pixels.swapaxes(0, 1)
        if self._mirrored:
            pixels = pixels[:, ::-1]
        if self._flipped:
            pixels = pixels[::-1]
        return np.ascontiguousarray(pixels)


class _NoPlaceToBegin(Exception):
    """What is marked as a key frame is none."""


def _from(packets: Iterator, stamp: int) -> Iterator:
    """From a key frame on, without those shown before it, which may need what was left out."""
    rest = itertools.dropwhile(lambda packet: packet.pts != stamp, packets)
    return (packet for packet in rest if packet.pts >= stamp)


def _turns(frame) -> tuple[bool, bool, bool]:
    """Whether a frame is meant to be seen with its axes swapped, and then mirrored left to right, and upside down."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV fails where a frame has data of a kind that it does not know, as photos have
        turn = round(frame.rotation / 90) % 4  # counter-clockwise
        return turn in (1, 3), turn in (2, 3), turn in (1, 2)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()  # x, y are shown at a x + c y, b x + d y
    if abs(a) >= abs(b):
        return False, a < 0, d < 0
    return True, c < 0, b < 0
