"""One clock for all streams of a file, whatever becomes of its time stamps."""

from fractions import Fraction
from types import SimpleNamespace

import pytest

from emollama_jax.media import timeline as module
from emollama_jax.media.timeline import read_timeline

UNIT = Fraction(1, 100)


def container(monkeypatch, packets, name="mpegts"):
    """A file of pictures (stream 0, packets of 4 units) and sound (stream 1, of 2), each packet as (stream, time)."""
    streams = [SimpleNamespace(index=i, time_base=UNIT) for i in range(2)]
    made = [
        SimpleNamespace(
            stream=streams[index], pts=at, dts=at, duration=(4, 2)[index], is_keyframe=True, is_discard=False, size=1
        )
        for index, at in packets
    ]
    monkeypatch.setattr(module, "read_packets", lambda container, *streams: made)
    return SimpleNamespace(
        streams=SimpleNamespace(video=streams[:1], audio=streams[1:]), format=SimpleNamespace(name=name)
    )


def recording(first):
    """Half a second, in which the sound begins 2 units before the pictures."""
    pictures, sound = ((0, first + 2 + 4 * i) for i in range(12)), ((1, first + 2 * i) for i in range(25))
    return sorted([*pictures, *sound], key=lambda packet: packet[1])


def times(timeline):
    return [timeline.times(i)[0].tolist() for i in range(2)]


@pytest.mark.parametrize("second", [100, 90, 0, 5000])
def test_a_clock_that_starts_again_goes_on_for_all_streams(monkeypatch, second):
    """Also where it leaps ahead, in formats whose clock may."""
    found = read_timeline(container(monkeypatch, recording(100) + recording(second)))
    assert found.shifts == [0, (150 - second) * UNIT]
    assert times(found) == [
        [*range(102, 150, 4), *range(152, 200, 4)],
        [*range(100, 150, 2), *range(150, 200, 2)],
    ]
    packets = [SimpleNamespace(pts=100, dts=None)] * 25 + [SimpleNamespace(pts=second, dts=second)]
    *_, last = found.shifted(SimpleNamespace(index=1), packets)
    assert (last.pts, last.dts) == (150, 150)


def test_a_stream_may_come_to_the_new_piece_later_than_the_other(monkeypatch):
    one, other = recording(100), recording(100)
    last = one.pop(max(i for i, (index, _) in enumerate(one) if index == 0))
    assert times(read_timeline(container(monkeypatch, [*one, *other[:1], last, *other[1:]])))[0] == [
        *range(102, 150, 4),
        *range(152, 200, 4),
    ]


def test_a_damaged_time_stamp_moves_no_other(monkeypatch):
    packets = recording(500)
    sound = [i for i, (index, _) in enumerate(packets) if index == 1]
    packets[sound[10]] = (1, 7)
    pictures, heard = times(read_timeline(container(monkeypatch, packets)))
    assert pictures == list(range(502, 550, 4))
    assert heard[:10] == list(range(500, 520, 2)) and heard[11:] == list(range(522, 550, 2))


@pytest.mark.smoke
def test_a_pause_is_kept(monkeypatch):
    packets = [(0, 0), (0, 4), (0, 5004)]
    assert times(read_timeline(container(monkeypatch, packets, "matroska")))[0] == [0, 4, 5004]
