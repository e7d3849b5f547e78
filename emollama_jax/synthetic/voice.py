"""Speech-like sound for synthetic clips: a pulse train through formants, syllable by syllable.

Axes: S samples.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from emollama_jax.media.audio import SAMPLE_RATE

LOUDEST = 0.9  # maximum absolute sample; louder clips are scaled down

# Formant frequencies in Hz, of an adult speaker who mumbles: further apart they would hide the tone from an untrained
# encoder, whose mean over a clip shows vowels first of all.
VOWELS = ((730, 1090, 2440), (660, 1200, 2500), (640, 1190, 2390))
BANDWIDTHS = (160, 200, 280)


@dataclass(frozen=True, slots=True)
class Tone:
    """Prosody and timbre."""

    pitch: float
    """Relative to the speaker's base pitch."""
    loudness: float
    """Root mean square."""
    tempo: float
    """Syllables a second."""
    breath: float
    """Noise in the voice, from 0 to 1."""
    dullness: float
    """Spectral tilt: the exponent of 1 / frequency."""


# The tone of each level of the voice factor. The pitch stays where it is within a clip, for the same reason.
TONES = {
    "lively": Tone(pitch=1.7, loudness=0.11, tempo=5.5, breath=0.05, dullness=1.2),
    "hushed": Tone(pitch=0.95, loudness=0.03, tempo=2.6, breath=0.8, dullness=2.0),
    "firm": Tone(pitch=1.0, loudness=0.13, tempo=3.8, breath=0.0, dullness=0.5),
}


@dataclass(frozen=True, slots=True)
class Speaker:
    """What all that one person says has in common."""

    pitch: float
    """Base pitch in Hz."""
    tract: float
    """Relative height of the formants: the shorter the vocal tract, the higher they are."""


def random_speaker(rng: np.random.Generator) -> Speaker:
    """Draw an adult speaker."""
    return Speaker(pitch=rng.uniform(105, 140), tract=rng.uniform(0.92, 1.15))


def voice(speaker: Speaker, tone: Tone, seconds: float, rng: np.random.Generator) -> Float[np.ndarray, " S"]:
    """Synthesise vowels, float32, 16 kHz, mono; which, and their lengths, depend on `rng` alone."""
    length = round(seconds * SAMPLE_RATE)
    loudness = tone.loudness * rng.uniform(0.85, 1.15)
    begin, end = 0.04 * length, 0.96 * length  # silence before and after
    count = max(1, round((end - begin) / SAMPLE_RATE * tone.tempo))
    shares = rng.uniform(0.75, 1.25, count)
    edges = begin + (end - begin) * np.concatenate([[0], np.cumsum(shares) / shares.sum()])
    vowels = rng.permutation(np.arange(count) % len(VOWELS))

    source = _pulses(speaker.pitch * tone.pitch, length) + tone.breath * 0.25 * rng.standard_normal(length)
    sound = np.zeros(length)
    for start, stop, vowel in zip(edges[:-1].astype(int), edges[1:].astype(int), vowels, strict=True):
        place = slice(start, stop)
        hill = np.sin(np.pi * np.linspace(0, 1, stop - start)) ** 0.6
        sound[place] = hill * _formants(source[place], np.array(VOWELS[vowel]) * speaker.tract, tone.dullness)
    sound += 1e-4 * rng.standard_normal(length)  # background noise
    sound *= loudness / np.sqrt(np.mean(sound**2))
    return (sound * min(1.0, LOUDEST / np.abs(sound).max())).astype(np.float32)


def _pulses(pitch: float, length: int) -> Float[np.ndarray, " S"]:
    """One pulse a period, of the same power at every pitch in Hz, interpolated between the two nearest samples."""
    phase = np.arange(1, length + 1) * pitch / SAMPLE_RATE
    at = np.flatnonzero(np.diff(np.floor(phase)) > 0) + 1
    late = (phase[at] % 1) / (pitch / SAMPLE_RATE)  # by how many samples the pulse precedes this one
    train = np.zeros(length)
    height = np.sqrt(SAMPLE_RATE / pitch) / 4
    train[at] += height * (1 - late)
    train[at - 1] += height * late
    return train


def _formants(
    source: Float[np.ndarray, " s"], centers: Float[np.ndarray, " 3"], dullness: float
) -> Float[np.ndarray, " s"]:
    """Filter the source by the resonances of a vowel and the spectral tilt."""
    size = 2 << len(source).bit_length()  # zero-padded against circular convolution, to a power of two
    frequency = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    gain = (1 + (frequency / 150) ** 2) ** (-dullness / 2) * (frequency > 40)
    for center, width in zip(centers, BANDWIDTHS, strict=True):
        gain = gain * center**2 / (center**2 - frequency**2 + 1j * width * frequency)
    return np.fft.irfft(np.fft.rfft(source, size) * gain, size)[: len(source)]
