"""Sound as HuBERT takes it: 16 kHz, mono, of zero mean and unit variance.

Axes: S samples.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from emollama_jax.errors import UserError
from emollama_jax.media.container import damaged, decode, import_av, open_media, read_packets, video_streams

SAMPLE_RATE = 16000
VARIANCE_EPS = 1e-7
MAX_CHANNELS = 32  # more is time where channels should be
LOUDEST = 2.0**32  # floats at the scale of integer PCM pass; squares of what is larger would overflow
RATES = (1000, 1_000_000)  # beyond, a damaged header asks for more memory than there is
DRIFT = 0.1  # seconds; what time stamps may be off the count of samples, as they are rounded
LONGEST_GAP = 3600.0  # seconds; a longer one is a damaged time stamp
PADDING = 0.2  # seconds; the last packet of a codec is longer than the sound, by less than this


def read_sound(path: str | Path, max_seconds: float | None = None) -> Float[np.ndarray, " S"] | None:
    """The sound of a video or audio file: 16 kHz, mono, float32 from -1 to 1.

    It begins with the first frame of the video: what is earlier is cut off, and silence stands where there is none yet,
    and in place of what cannot be decoded. Decoding keeps no more in memory than the result.

    Args:
        max_seconds: how much of it is read; None for all.

    Returns:
        The first stream that has sound, or None where there is no sound.

    Raises:
        UserError: PyAV is not installed, there is no such file, or nothing of its sound can be decoded.
    """
    undecodable = False
    for position in itertools.count():
        with open_media(path) as container:
            if position == len(container.streams.audio):
                break
            stream = container.streams.audio[position]
            packets = read_packets(container, stream)
            if (packet := next(packets, None)) is None:
                continue
            chunks = _resampled(stream, decode(stream, itertools.chain([packet], packets)))
            if (chunk := next(chunks, None)) is None:
                undecodable = True
                continue
            zero = _zero(container, chunk)
            sound = _laid_out(itertools.chain([chunk], chunks), zero, max_seconds)
            if stream.duration and stream.start_time is not None:
                length = round((stream.start_time + stream.duration) * stream.time_base * SAMPLE_RATE) - zero
                if 0 < len(sound) - length < PADDING * SAMPLE_RATE:
                    sound = sound[:length]
        if sound.size:
            return sound
    if undecodable:
        raise damaged(path)
    return None


class _Chunk(NamedTuple):
    """A piece of sound at 16 kHz."""

    at: int | None
    """The time of its first sample, in samples, as the file has it; None follows on."""
    samples: Float[np.ndarray, " S"]


def _resampled(stream, frames: Iterator) -> Iterator[_Chunk]:
    """Frames of whatever form at 16 kHz in mono; the form may change on the way."""
    av = import_av()
    form, graph = None, None
    for frame in frames:
        found = frame.format.name, frame.layout.name, frame.sample_rate
        if found != form:
            yield from _through(graph, None)
            form, graph = found, None
            if RATES[0] <= frame.sample_rate <= RATES[1]:
                with contextlib.suppress(av.FFmpegError):  # channels that nobody knows how to mix
                    graph = _resampler(*found, stream.time_base)
        yield from _through(graph, frame)
    yield from _through(graph, None)


def _resampler(sample_format: str, layout: str, rate: int, time_base: Fraction):
    """A filter graph of FFmpeg's. Channels are mixed by the weights of their places, of which the sum is one."""
    graph = import_av().filter.Graph()
    source = graph.add_abuffer(sample_rate=rate, format=sample_format, layout=layout, time_base=time_base)
    resampler = graph.add("aresample", f"{SAMPLE_RATE}:ochl=mono:osf=flt:rematrix_maxval=1")
    graph.link_nodes(source, resampler, graph.add("abuffersink")).configure()
    return graph


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


def _zero(container, first: _Chunk) -> int:
    """The time of the first frame of the video, in samples; of the first sample where there is no video."""
    for stream in video_streams(container):
        if stream.start_time is not None:
            return round(stream.start_time * stream.time_base * SAMPLE_RATE)
    return first.at or 0


def _laid_out(chunks: Iterator[_Chunk], zero: int, max_seconds: float | None) -> Float[np.ndarray, " S"]:
    """The chunks at their times, from the time `zero` on."""
    limit = math.inf if max_seconds is None else round(max_seconds * SAMPLE_RATE)
    parts, length = [np.zeros(0, np.float32)], 0
    for at, samples in chunks:
        gap = 0 if at is None else at - zero - length
        if length and abs(gap) <= DRIFT * SAMPLE_RATE:
            gap = 0
        if abs(gap) > LONGEST_GAP * SAMPLE_RATE:
            zero, gap = zero + gap, 0
        if gap > 0:
            parts.append(np.zeros(min(gap, limit - length), np.float32))
        parts.append(samples[max(-gap, 0) :])
        length += max(gap, 0) + len(parts[-1])
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
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128) / 128
    elif np.issubdtype(samples.dtype, np.signedinteger):
        samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    elif not np.issubdtype(samples.dtype, np.floating):
        raise UserError(f"{where}: samples are {samples.dtype}; give floats, or signed integers or uint8 as PCM has")
    with np.errstate(over="ignore"):
        samples = samples.astype(np.float32)
    if not np.all(np.abs(samples) < LOUDEST):
        raise UserError(f"{where}: the audio holds NaN, infinity or absurd numbers; decode it again or leave it out")
    return samples.mean(axis=0) if samples.ndim == 2 else samples


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
