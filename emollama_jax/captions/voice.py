"""The tone of a voice in words, by measurement: how it differs from the voices of the other clips of a set.

Axes: S samples at 16 kHz, F frames of FRAME samples every HOP samples.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from emollama_jax.media.audio import SAMPLE_RATE

VERSION = 1  # counted up when the same sound would give other measures or words
FRAME, HOP = 640, 160
HOP_S = HOP / SAMPLE_RATE
PITCH = (65.0, 420.0)  # Hz, of voices
VOICED = 0.45  # of the autocorrelation at the pitch period, of 1
QUIET_DB = 25.0  # below the loudest frames nothing is said
SOFTEST_DB = -55.0  # of full scale; what is below is the hum of a recording without a voice
SHORTEST_PAUSE_S = 0.2
FEWEST = 8  # voices that make a norm; fewer are compared with TYPICAL
CLEAR, STRONG = 0.6, 1.6  # deviations from the norm, in spreads, that are said, and said with "very"

Measures = Mapping[str, float]


class Norm(NamedTuple):
    """The usual value of a measure, and how far it usually is from that."""

    middle: float
    spread: float


# Of adult speech, recorded near; and the least spreads, below which a difference is not heard.
TYPICAL = {
    "pitch": Norm(19.0, 5.0),  # 165 Hz
    "range": Norm(5.0, 2.0),
    "loudness": Norm(-24.0, 6.0),
    "tempo": Norm(4.0, 1.0),
    "pauses": Norm(0.15, 0.12),
    "breath": Norm(0.2, 0.08),
    "rise": Norm(-1.0, 2.0),
}
LEAST = {"pitch": 1.0, "range": 0.5, "loudness": 1.5, "tempo": 0.3, "pauses": 0.04, "breath": 0.03, "rise": 1.0}
WORDS = {
    "pitch": ("low", "high"),
    "loudness": ("quiet", "loud"),
    "tempo": ("slow", "quick"),
    "breath": ("clear", "breathy"),
}
AFTER = {
    "range": ("little change of pitch", "much change of pitch"),
    "pauses": ("hardly a pause", "long pauses"),
    "rise": ("a pitch that falls towards the end", "a pitch that rises towards the end"),
}


def measure_voice(sound: Float[np.ndarray, " S"]) -> dict[str, float] | None:
    """Measures a voice; None where none is heard.

    Returns:
        pitch: median, in semitones above 55 Hz; range: of the pitch, from the 10th to the 90th percentile, in
        semitones; loudness: in dB of full scale where something is said; tempo: syllables a second, as peaks of the
        loudness; pauses: their share of the time from the first to the last word; breath: how far the voiced sound is
        from periodic, 0 to 1; rise: of the pitch from the first to the last third, in semitones.
    """
    if len(sound) < 4 * FRAME:
        return None
    frames = np.lib.stride_tricks.sliding_window_view(sound.astype(np.float64), FRAME)[::HOP]
    level = 10 * np.log10(np.mean(frames**2, axis=1) + 1e-12)
    said = level > max(np.percentile(level, 95) - QUIET_DB, SOFTEST_DB)
    pitch, periodic = _pitch(frames)
    voiced = said & (periodic >= VOICED)
    if voiced.sum() < 5:
        return None
    first, last = np.flatnonzero(said)[[0, -1]]
    heights = _without_octaves(12 * np.log2(pitch[voiced] / 55))
    third = max(1, len(heights) // 3)
    low, high = np.percentile(heights, (10, 90))
    measures = {
        "pitch": np.median(heights),
        "range": high - low,
        "loudness": 10 * np.log10(np.mean(10 ** (level[said] / 10))),
        "tempo": _syllables(level[first : last + 1]) / max((last + 1 - first) * HOP_S, 0.1),
        "pauses": _pauses(said[first : last + 1]),
        "breath": 1 - np.mean(periodic[voiced]),
        "rise": np.median(heights[-third:]) - np.median(heights[:third]),
    }
    return {name: round(float(value), 3) for name, value in measures.items()}


def _pitch(frames: Float[np.ndarray, "F L"]) -> tuple[Float[np.ndarray, " F"], Float[np.ndarray, " F"]]:
    """The pitch of each frame in Hz, and how periodic it is, from 0 to 1."""
    frames = (frames - frames.mean(axis=1, keepdims=True)) * np.hanning(FRAME)
    spectrum = np.abs(np.fft.rfft(frames, 2 * FRAME)) ** 2
    window = np.fft.irfft(np.abs(np.fft.rfft(np.hanning(FRAME), 2 * FRAME)) ** 2)[:FRAME]
    similar = np.fft.irfft(spectrum)[:, :FRAME]
    similar = similar / np.maximum(similar[:, :1], 1e-12) / np.maximum(window / window[0], 0.05)
    shortest, longest = int(SAMPLE_RATE / PITCH[1]), int(SAMPLE_RATE / PITCH[0])
    inside = similar[:, shortest : longest + 1]
    # Of periods that are about as good the shortest: twice a period is one as well.
    lag = shortest + np.argmax(inside >= 0.9 * inside.max(axis=1, keepdims=True), axis=1)
    step = np.arange(len(lag))
    while (better := (lag < longest) & (similar[step, np.minimum(lag + 1, longest)] > similar[step, lag])).any():
        lag = lag + better
    return SAMPLE_RATE / lag, np.clip(similar[step, lag], 0, 1)


def _without_octaves(heights: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Semitones in which those are put right that are an octave off the median, to a semitone and a half: in a breathy
    voice half or twice the period is at times as good as the period."""
    off = heights - np.median(heights)
    return heights - np.where(np.abs(np.abs(off) - 12) < 1.5, 12 * np.sign(off), 0)


def _syllables(level: Float[np.ndarray, " F"]) -> int:
    """Counts the peaks of the loudness that stand out by 2 dB."""
    smooth = np.convolve(np.pad(level, 3, mode="edge"), np.ones(7) / 7, mode="valid")
    count, low, high, rising = 0, smooth[0], smooth[0], True
    for value in smooth:
        if rising:
            high = max(high, value)
            if high - low >= 2 and value <= high - 2:
                count, low, rising = count + 1, value, False
        else:
            low = min(low, value)
            if value >= low + 2:
                high, rising = value, True
    return count + int(rising and high - low >= 2)


def _pauses(said: Bool[np.ndarray, " F"]) -> float:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], (~said).astype(int), [0]]))).reshape(-1, 2)
    lengths = edges[:, 1] - edges[:, 0]
    return float(lengths[lengths * HOP_S >= SHORTEST_PAUSE_S].sum() / max(len(said), 1))


def find_norms(voices: Sequence[Measures]) -> dict[str, Norm]:
    """Finds the usual values of a set of voices; TYPICAL where there are fewer than FEWEST."""
    if len(voices) < FEWEST:
        return TYPICAL
    norms = {}
    for name, least in LEAST.items():
        low, middle, high = np.percentile([voice[name] for voice in voices], (16, 50, 84))
        norms[name] = Norm(round(float(middle), 3), round(float(max((high - low) / 2, least)), 3))
    return norms


def describe_voice(measures: Measures | None, norms: Mapping[str, Norm]) -> str:
    """Says how a voice differs from the norms, as in "a high, quick voice with much change of pitch"; "" of none."""
    if measures is None:
        return ""

    def degree(name: str) -> float:
        return (measures[name] - norms[name].middle) / norms[name].spread

    def said(name: str, pair: tuple[str, str]) -> str:
        return pair[degree(name) > 0]

    before = [
        ("very " if abs(degree(name)) >= STRONG else "") + said(name, pair)
        for name, pair in WORDS.items()
        if abs(degree(name)) >= CLEAR
    ]
    after = [said(name, pair) for name, pair in AFTER.items() if abs(degree(name)) >= CLEAR]
    voice = f"a {', '.join(before)} voice" if before else "a voice of usual pitch, loudness and pace"
    return f"{voice} with {join(after)}" if after else voice


def join(parts: Sequence[str]) -> str:
    """Joins parts of a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))
