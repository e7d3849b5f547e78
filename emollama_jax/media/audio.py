"""Sound as HuBERT takes it: 16 kHz, mono, of zero mean and unit variance.

Axes: S samples.
"""

import math

import numpy as np
from jaxtyping import Float, Shaped

from emollama_jax.errors import UserError

SAMPLE_RATE = 16000
VARIANCE_EPS = 1e-7
MAX_CHANNELS = 32  # more is time where channels should be
LOUDEST = 2.0**32  # floats at the scale of integer PCM pass; squares of what is larger would overflow
RATES = (1000, 1_000_000)  # beyond, a damaged header asks for more memory than there is


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
