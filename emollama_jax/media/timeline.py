"""One clock for all streams of a file, from the time stamps of its packets: nothing is decoded.

Where recordings are joined as files are, as transport streams may be, the clock starts again: there a new *piece*
begins, and it follows on the one before, by the same shift in every stream. A time stamp that is damaged makes a piece
of its own, after which its stream is in the earlier one again.
"""

import dataclasses
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from emollama_jax.media.container import read_packets

BACKWARD_S = 0.1  # a clock that goes back farther has started again, as FFmpeg takes it
FORWARD_S = 10.0  # and one that leaps farther, in RESTARTING formats
NEAR_S = 1.0  # a packet that lies so near to the last of its stream in another piece is of that piece
RESTARTING = ("mpegts", "mpeg")


@dataclass
class PacketTable:
    """The packets of a stream in the order of the file, without what an edit list cuts off; times in the stream's unit,
    not shifted."""

    unit: Fraction
    """Seconds."""
    presented: array = field(default_factory=lambda: array("q"))
    """0 where the packet does not say."""
    decoded: array = field(default_factory=lambda: array("q"))
    durations: array = field(default_factory=lambda: array("q"))
    keys: array = field(default_factory=lambda: array("b"))
    timed: bool = True
    """Whether every packet says when it is shown."""
    pieces: array = field(default_factory=lambda: array("q"))
    """The piece of each."""

    def add(self, packet, piece: int) -> None:
        self.timed = self.timed and packet.pts is not None
        row = packet.pts or 0, packet.dts or 0, packet.duration or 0, packet.is_keyframe, piece
        columns = self.presented, self.decoded, self.durations, self.keys, self.pieces
        for column, value in zip(columns, row, strict=True):
            column.append(value)


@dataclass(frozen=True)
class Timeline:
    """The packets of a file's pictures and sound, and its clock."""

    tables: dict[int, PacketTable]
    """By the stream's index."""
    starts: dict[int, list[tuple[int, int]]]
    """Of each stream, (number of a packet, piece that begins with it); packets count from 0, all of them."""
    shifts: list[Fraction]
    """Seconds that are added to the times of each piece."""
    origin: Fraction | None = None
    """When the first frame is shown, in seconds on the shifted clock; None where no frame is."""

    def shifted(self, stream, packets: Iterable) -> Iterator:
        """A stream's packets, from its first on, with their times on the one clock."""
        starts, shift = dict(self.starts.get(stream.index, ())), 0
        for number, packet in enumerate(packets):
            if number in starts:
                shift = self._shift(stream.index, starts[number])
            if shift:
                packet.pts = None if packet.pts is None else packet.pts + shift
                packet.dts = None if packet.dts is None else packet.dts + shift
            yield packet

    def times(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """When a stream's packets are shown and decoded, in its unit, on the one clock; int64."""
        table = self.tables[index]
        shifts = np.array([self._shift(index, piece) for piece in range(len(self.shifts))], np.int64)
        shift = shifts[np.frombuffer(table.pieces, np.int64)] if len(table.pieces) else shifts[:0]
        return np.array(table.presented, np.int64) + shift, np.array(table.decoded, np.int64) + shift

    def with_origin(self, origin: Fraction) -> "Timeline":
        return dataclasses.replace(self, origin=origin)

    def _shift(self, index: int, piece: int) -> int:
        return round(self.shifts[piece] / self.tables[index].unit)


def read_timeline(container) -> Timeline:
    """The timeline of an open container that nothing was read of yet; afterwards it is at its end."""
    streams = [*container.streams.video, *container.streams.audio]
    tables = {stream.index: PacketTable(Fraction(stream.time_base)) for stream in streams if stream.time_base}
    pieces = _Pieces(container.format.name in RESTARTING)
    counts = dict.fromkeys(tables, 0)
    for packet in read_packets(container, *(stream for stream in streams if stream.index in tables)):
        index = packet.stream.index
        piece = pieces.of_packet(index, packet, float(tables[index].unit), counts[index])
        counts[index] += 1
        if not packet.is_discard:
            tables[index].add(packet, piece)
    return Timeline(tables, pieces.starts, pieces.shifts(tables))


class _Pieces:
    """Tells to which piece each packet belongs, as they come."""

    def __init__(self, restarting: bool):
        self.starts: dict[int, list[tuple[int, int]]] = {}
        self._restarting = restarting
        self._near: list[float] = [0.0]
        """What brings each piece to follow on, in the stream that came to it first."""
        self._ends: dict[int, float] = {}
        """Of each stream, when its next packet is expected."""

    def of_packet(self, index: int, packet, unit: float, number: int) -> int:
        starts = self.starts.setdefault(index, [(0, 0)])
        piece = starts[-1][1]
        if packet.dts is None:  # as of the first packets in Matroska, whose times of showing go to and fro
            return piece
        at, end = packet.dts * unit, self._ends.get(index)
        if end is not None and (found := self._jump(at, end, piece)) != piece:
            piece = found
            starts.append((number, piece))
        self._ends[index] = at + self._near[piece] + (packet.duration or 0) * unit
        return piece

    def _jump(self, at: float, end: float, piece: int) -> int:
        """The piece of a packet that is decoded at `at` where its stream had come to `end` in a piece."""
        if -BACKWARD_S <= at + self._near[piece] - end <= NEAR_S:
            return piece
        steps = [at + near - end for near in self._near]
        nearest = min(range(len(steps)), key=lambda i: abs(steps[i]))
        if -BACKWARD_S <= steps[nearest] <= NEAR_S:
            return nearest
        if steps[piece] > 0 and not (self._restarting and steps[piece] > FORWARD_S):
            return piece  # a pause
        self._near.append(end - at)
        return len(self._near) - 1

    def shifts(self, tables: dict[int, PacketTable]) -> list[Fraction]:
        """Seconds by which each piece is shifted, so that it begins with all streams where the last of the one before
        has ended."""
        near = [Fraction(shift).limit_denominator(10**6) for shift in self._near]
        if any(a > b for starts in self.starts.values() for (_, a), (_, b) in zip(starts, starts[1:], strict=False)):
            return near  # of damaged time stamps: pieces lie within others
        shifts, ended = near[:1], _span(tables, 0)[1]
        for piece in range(1, len(near)):
            begins, ends = _span(tables, piece)
            shifts.append(near[piece] if None in (ended, begins) else ended + shifts[-1] - begins)
            ended = ends
        return shifts


def _span(tables: dict[int, PacketTable], piece: int) -> tuple[Fraction | None, Fraction | None]:
    """When a piece begins and ends in its own seconds; None where it has no packet."""
    begins, ends = [], []
    for table in tables.values():
        inside = np.frombuffer(table.pieces, np.int64) == piece
        if inside.any():
            times = np.frombuffer(table.presented if table.timed else table.decoded, np.int64)[inside]
            durations = np.frombuffer(table.durations, np.int64)[inside]
            begins.append(int(times.min()) * table.unit)
            ends.append(int((times + durations).max()) * table.unit)
    return min(begins, default=None), max(ends, default=None)
