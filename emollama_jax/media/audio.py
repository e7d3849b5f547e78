"""Sound as HuBERT takes it: 16 kHz, mono, of zero mean and unit variance.

Axes: S samples.
"""

import io
import itertools
import math
import wave
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from emollama_jax.errors import UserError
from emollama_jax.media.container import audio_streams, damaged, decode, import_av, open_media, read_packets
from emollama_jax.media.timeline import Timeline, read_timeline
from emollama_jax.media.video import WITHOUT_TIMES, Video

SAMPLE_RATE = 16000
VARIANCE_EPS = 1e-7
MAX_CHANNELS = 32  # more is time where channels should be
LOUDEST = 2.0**32  # floats at the scale of integer PCM pass; squares of what is larger would overflow
RATES = (1000, 1_000_000)  # beyond, a damaged header asks for more memory than there is
DRIFT = 0.1  # seconds; what time stamps may be off the count of samples, as they are rounded
JITTER = 0.004  # seconds; what they may be off the one before; a lost packet is more
PCM = (np.signedinteger, np.floating)
CANCELLED = 0.05  # of the louder channel of two; their mix is never so quiet but where one is the other's opposite
SILENT = 2.0**-14  # what dither and a codec make of zeros
LONGEST_GAP = 3600.0  # seconds; a longer one is a damaged time stamp
PADDING = 0.2  # seconds; the last packet of a codec is longer than the sound, by less than this


def read_sound(
    path: str | Path, max_seconds: float | None = None, timeline: Timeline | None = None
) -> Float[np.ndarray, " S"] | None:
    """The sound of a video or audio file: 16 kHz, mono, float32 from -1 to 1.

    It begins with the first frame of the video: what is earlier is cut off, and silence stands where there is none yet,
    and in place of what cannot be decoded. Decoding keeps no more in memory than the result.

    Args:
        max_seconds: how much of it is read; None for all.
        timeline: the file's, where a `Video` has read it.

    Returns:
        The best stream (`audio_streams`) that has sound, which silence (`is_silent`) is none where another has some; or
        None where there is no sound.

    Raises:
        UserError: PyAV is not installed, there is no such file, or nothing of its sound can be decoded.
    """
    with open_media(path) as container:
        indices = [stream.index for stream in audio_streams(container)]
    if not indices:
        return None
    timeline = timeline or _find_timeline(path)
    silence, decodable = None, True
    for index in indices:
        if not timeline.tables.get(index) or not timeline.tables[index].keys:
            continue
        sound, levels = _read_stream(path, index, timeline, max_seconds)
        if sound is None:
            decodable = False
            continue
        if len(levels) == 2 and np.abs(sound).max(initial=0) < CANCELLED * levels.max():  # each other's opposite
            sound, _ = _read_stream(path, index, timeline, max_seconds, channel=int(levels.argmax()))
        if not is_silent(sound):
            return sound
        if silence is None and sound.size:
            silence = sound
    if silence is None and not decodable:
        raise damaged(path)
    return silence


def is_silent(sound: Float[np.ndarray, " S"]) -> bool:
    """Whether sound is digital silence, as of a track in which nothing was recorded."""
    return bool(np.abs(sound).max(initial=0) <= SILENT)


def wav_bytes(sound: Float[np.ndarray, " S"] | None) -> bytes:
    """The sound, 16 kHz, mono, from -1 to 1, as a WAV file of 16 bits; None is one of no length."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(SAMPLE_RATE)
        writer.writeframes(b"" if sound is None else (sound.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def _find_timeline(path: str | Path) -> Timeline:
    """The timeline of a file, with an origin where it has a video."""
    try:
        with Video(path) as video:
            return video.timeline
    except UserError:
        with open_media(path) as container:
            return read_timeline(container)


def _read_stream(
    path: str | Path, index: int, timeline: Timeline, max_seconds: float | None, channel: int | None = None
) -> tuple[Float[np.ndarray, " S"] | None, Float[np.ndarray, " C"]]:
    """The sound of a stream, None where nothing can be decoded, and the level of each of its channels.

    Args:
        channel: taken alone; None mixes all.
    """
    levels = _Levels()
    with open_media(path) as container:
        stream = container.streams[index]
        packets = timeline.shifted(stream, read_packets(container, stream))
        chunks = _resampled(stream, levels.measured(decode(stream, packets)), channel)
        if (chunk := next(chunks, None)) is None:
            return None, levels.loudest
        zero = (chunk.at or 0) if timeline.origin is None else round(timeline.origin * SAMPLE_RATE)
        by_stamps = container.format.name not in WITHOUT_TIMES
        sound = _laid_out(itertools.chain([chunk], chunks), zero, max_seconds, by_stamps)
        if stream.duration and stream.start_time is not None and len(timeline.starts.get(index, ())) < 2:
            length = round((stream.start_time + stream.duration) * stream.time_base * SAMPLE_RATE) - zero
            if 0 < len(sound) - length < PADDING * SAMPLE_RATE:
                sound = sound[:length]
    return sound, levels.loudest


class _Levels:
    """Measures how loud each channel of the frames is that pass."""

    def __init__(self):
        self.loudest: Float[np.ndarray, " C"] = np.zeros(0)

    def measured(self, frames: Iterable) -> Iterator:
        for frame in frames:
            levels = np.abs(_planes(frame)).max(axis=1, initial=0)
            if len(levels) > len(self.loudest):
                self.loudest = np.pad(self.loudest, (0, len(levels) - len(self.loudest)))
            self.loudest[: len(levels)] = np.maximum(self.loudest[: len(levels)], levels)
            yield frame


class _Chunk(NamedTuple):
    """A piece of sound at 16 kHz."""

    at: int | None
    """The time of its first sample, in samples, as the file has it; None follows on."""
    samples: Float[np.ndarray, " S"]


def _resampled(stream, frames: Iterator, channel: int | None = None) -> Iterator[_Chunk]:
    """Frames of whatever form at 16 kHz in mono; the form may change on the way."""
    form, graph, mixed = None, None, False
    for frame in frames:
        found = frame.format.name, frame.layout.name, frame.sample_rate
        if found != form:
            yield from _through(graph, None)
            form, graph = found, None
            if RATES[0] <= frame.sample_rate <= RATES[1]:
                graph = _resampler(*found, stream.time_base) if channel is None else None
                # Of channels that nobody knows how to mix, as ambisonics or more than a layout names, the mean.
                mixed = graph is None
                graph = graph or _resampler("fltp", "mono", frame.sample_rate, stream.time_base)
        yield from _through(graph, _mono_frame(frame, channel) if mixed and graph else frame)
    yield from _through(graph, None)


def _resampler(sample_format: str, layout: str, rate: int, time_base: Fraction):
    """A filter graph of FFmpeg's; None for channels that it cannot mix. Channels are mixed by the weights of their
    places, of which the sum is one."""
    av = import_av()
    graph = av.filter.Graph()
    try:
        source = graph.add_abuffer(sample_rate=rate, format=sample_format, layout=layout, time_base=time_base)
        resampler = graph.add("aresample", f"{SAMPLE_RATE}:ochl=mono:osf=flt:rematrix_maxval=1")
        graph.link_nodes(source, resampler, graph.add("abuffersink")).configure()
    except (av.FFmpegError, ValueError):
        return None
    return graph


def _mono_frame(frame, channel: int | None):
    planes = _planes(frame)
    samples = planes.mean(axis=0) if channel is None else planes[min(channel, len(planes) - 1)]
    mono = import_av().AudioFrame.from_ndarray(np.ascontiguousarray(samples[None]), format="fltp", layout="mono")
    mono.sample_rate, mono.pts, mono.time_base = frame.sample_rate, frame.pts, frame.time_base
    return mono


def _planes(frame) -> Float[np.ndarray, "C S"]:
    """The samples of a frame, float32 from -1 to 1."""
    samples = frame.to_ndarray()
    return _floats(samples if frame.format.is_planar else samples.reshape(frame.samples, -1).T)


def _through(graph, frame) -> Iterator[_Chunk]:
    """What comes out of the graph for a frame, or for None at the end of frames."""
    av = import_av()
    if graph is None:
        return
    try:
        graph.push(frame)
        while True:
            out = graph.pull()
            yield _Chunk(out.pts, out.to_ndarray()[0])
    except (av.BlockingIOError, av.EOFError):  # it needs more, or has no more
        return


def _laid_out(
    chunks: Iterator[_Chunk], zero: int, max_seconds: float | None, by_stamps: bool
) -> Float[np.ndarray, " S"]:
    """The chunks at their times, from the time `zero` on.

    Args:
        by_stamps: whether time stamps can be relied on to show the loss of a packet.
    """
    limit = math.inf if max_seconds is None else round(max_seconds * SAMPLE_RATE)
    parts, length, expected = [np.zeros(0, np.float32)], 0, None
    for at, samples in chunks:
        gap = 0 if at is None else at - zero - length
        lost = by_stamps and None not in (at, expected) and at - expected > JITTER * SAMPLE_RATE
        if length and abs(gap) <= DRIFT * SAMPLE_RATE and not lost:
            gap = 0
        if abs(gap) > LONGEST_GAP * SAMPLE_RATE:
            zero, gap = zero + gap, 0
        if gap > 0:
            parts.append(np.zeros(min(gap, limit - length), np.float32))
        parts.append(samples[max(-gap, 0) :])
        length += max(gap, 0) + len(parts[-1])
        expected = None if at is None else at + len(samples)
        if length >= limit:
            break
    return np.concatenate(parts)[: None if max_seconds is None else limit]


def hubert_waveform(samples: Shaped[np.ndarray, "..."], rate: int, where: str = "audio") -> Float[np.ndarray, " S"]:
    """A waveform for `Hubert.encode`, float32: what transformers' `Wav2Vec2FeatureExtractor` gives.

    Args:
        samples: [S] or [channels, S], float (from -1 to 1) or integer PCM.
        rate: samples a second.
        where: the clip's name, for messages.

    Raises:
        UserError: no samples, NaN or infinity, no such rate, or another shape or dtype.
    """
    return standardize(resample(mono(samples, where), rate, where))


def mono(samples: Shaped[np.ndarray, "..."], where: str = "audio") -> Float[np.ndarray, " S"]:
    """The mean of the channels, float32 from -1 to 1.

    Raises:
        UserError: as `hubert_waveform`.
    """
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and samples.shape[0] > MAX_CHANNELS):
        raise UserError(f"{where}: samples are {list(samples.shape)}; give [samples] or [channels, samples]")
    if samples.size == 0:
        raise UserError(f"{where}: the audio has no samples; leave it out")
    if not (samples.dtype == np.uint8 or any(np.issubdtype(samples.dtype, kind) for kind in PCM)):
        raise UserError(f"{where}: samples are {samples.dtype}; give floats, or signed integers or uint8 as PCM has")
    samples = _floats(samples)
    if not np.all(np.abs(samples) < LOUDEST):
        raise UserError(f"{where}: the audio holds NaN, infinity or absurd numbers; decode it again or leave it out")
    return samples.mean(axis=0) if samples.ndim == 2 else samples


def _floats(samples: Shaped[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """PCM of any type as float32, integers from -1 to 1."""
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if np.issubdtype(samples.dtype, np.signedinteger):
        return samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    with np.errstate(over="ignore"):
        return samples.astype(np.float32)


def resample(samples: Float[np.ndarray, " S"], rate: int, where: str = "audio") -> Float[np.ndarray, " s"]:
    """The samples at 16 kHz, by a polyphase filter.

    Raises:
        UserError: no such rate.
    """
    if rate == SAMPLE_RATE:
        return samples
    low, high = RATES
    if not low <= rate <= high or int(rate) != rate:
        raise UserError(f"{where}: a sample rate of {rate}; give a whole number of samples a second, {low} to {high}")
    from scipy.signal import resample_poly

    divisor = math.gcd(int(rate), SAMPLE_RATE)
    return resample_poly(samples, SAMPLE_RATE // divisor, int(rate) // divisor).astype(np.float32)


def standardize(samples: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    """To zero mean and unit variance; silence stays silence."""
    return (samples - samples.mean()) / np.sqrt(samples.var() + VARIANCE_EPS)
