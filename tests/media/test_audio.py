"""Sound for HuBERT: against Hugging Face's feature extractor on real speech, and at every rate and in every form."""

import warnings

import numpy as np
import pytest

from emollama_jax.errors import UserError
from emollama_jax.media.audio import hubert_waveform, mono, resample

RATE = 16000


def sine(frequency, rate, seconds=1.0):
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


@pytest.fixture(scope="module")
def speech(real_media):
    """The sound of a real video: 8.7 s, 16 kHz, mono, int16."""
    av = pytest.importorskip("av")
    with av.open(str(real_media.clips[0])) as file:
        resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE)
        parts = [part for frame in file.decode(audio=0) for part in resampler.resample(frame)]
    samples = np.concatenate([part.to_ndarray()[0] for part in parts])
    assert 8 * RATE < len(samples) < 9 * RATE and np.abs(samples).max() > 3000
    return samples


def test_real_speech_is_as_hugging_face_prepares_it(speech):
    transformers = pytest.importorskip("transformers")
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=True)
    ours = hubert_waveform(speech, RATE)
    theirs = extractor(speech / np.float32(32768), sampling_rate=RATE, return_tensors="np")["input_values"][0]
    assert ours.dtype == theirs.dtype == np.float32 and ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-5


@pytest.mark.smoke
def test_faint_sound_is_as_hugging_face_prepares_it():
    """Where the epsilon beside the variance counts."""
    transformers = pytest.importorskip("transformers")
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=True)
    faint = sine(440, RATE) * 1e-3 + np.float32(0.2)
    theirs = extractor(faint, sampling_rate=RATE, return_tensors="np")["input_values"][0]
    ours = hubert_waveform(faint, RATE)
    assert 0.5 < ours.std() < 0.9
    assert np.abs(ours - theirs).max() <= 1e-5


def test_real_speech_at_another_rate_is_the_same_speech(speech):
    """Through 48 kHz and back: speech has little above the filter's edge."""
    there = np.float32(speech) / 32768
    signal = pytest.importorskip("scipy.signal")
    back = resample(signal.resample_poly(there, 3, 1).astype(np.float32), 48000)
    assert back.shape == there.shape
    assert np.abs(back - there).std() < 0.02 * there.std()


@pytest.mark.smoke
@pytest.mark.parametrize("frequency", [100, 440, 3000])
@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 32000, 44100, 48000, 96000])
def test_a_tone_keeps_its_frequency_amplitude_and_phase(rate, frequency):
    ours = resample(sine(frequency, rate), rate)
    assert ours.dtype == np.float32 and ours.shape == (RATE,)
    inside = slice(200, -200)  # a filter sees silence beyond the ends
    assert np.abs(ours - sine(frequency, RATE))[inside].max() < 0.002


@pytest.mark.smoke
@pytest.mark.parametrize("rate", [24000, 44100, 48000])
def test_a_tone_too_high_for_16_khz_is_gone(rate):
    assert np.abs(resample(sine(10000, rate), rate))[200:-200].max() < 0.002


@pytest.mark.smoke
@pytest.mark.parametrize("rate", [8000, 22050, 44100])
@pytest.mark.parametrize("samples", [1, 2, 999, 4410])
def test_the_length_is_that_of_the_time(rate, samples):
    assert len(hubert_waveform(np.ones(samples, np.float32), rate)) == -(-samples * RATE // rate)


@pytest.mark.smoke
def test_16_khz_is_left_as_it_is():
    samples = sine(7900, RATE)
    assert np.array_equal(resample(samples, RATE), samples)


STEPS = np.arange(-128, 128)  # samples that every form can hold


@pytest.mark.smoke
@pytest.mark.parametrize(
    "samples",
    [
        STEPS.astype(np.int8),
        (STEPS + 128).astype(np.uint8),
        (STEPS * 2**8).astype(np.int16),
        (STEPS * 2**8).astype(">i2"),
        (STEPS * 2**24).astype(np.int32),
        (STEPS / 128).astype(np.float16),
        STEPS / 128,
    ],
    ids=lambda samples: samples.dtype.str,
)
@pytest.mark.parametrize("channels", [None, 1, 2])
def test_pcm_is_the_float_that_it_stands_for(samples, channels):
    ours = mono(samples if channels is None else np.stack([samples] * channels))
    assert ours.dtype == np.float32
    assert np.array_equal(ours, np.float32(STEPS / 128))


@pytest.mark.smoke
@pytest.mark.parametrize("scale, dtype", [(1, np.float32), (2**15, np.int16)])
def test_channels_become_their_mean(scale, dtype):
    channels = (np.array([[0.5, -0.25, 0.0], [0.25, 0.25, 0.5]]) * scale).astype(dtype)
    assert mono(channels).tolist() == [0.375, 0.0, 0.25]


@pytest.mark.smoke
def test_loud_channels_do_not_wrap_around():
    assert mono(np.full((2, 4), 32767, np.int16)).tolist() == [32767 / 32768] * 4


@pytest.mark.smoke
@pytest.mark.parametrize("rate", [8000, RATE, 44100])
@pytest.mark.parametrize("value", [0.0, 0.1, -1.0])
def test_silence_stays_finite(rate, value):
    with warnings.catch_warnings(action="error"):
        ours = hubert_waveform(np.full(rate, value, np.float32), rate)
    assert np.isfinite(ours).all()
    if rate == RATE or not value:  # a constant begins and ends, which a filter hears
        assert np.abs(ours).max() < 1e-3


@pytest.mark.smoke
def test_the_level_of_the_recording_does_not_matter():
    samples = sine(440, RATE) + np.float32(0.1)
    for scale in (0.5, 1.0, 32768.0):
        ours = hubert_waveform(samples * np.float32(scale), RATE)
        assert abs(ours.mean()) < 1e-5 and abs(ours.std() - 1) < 1e-5


WRONG = {
    "no samples": (np.zeros(0, np.float32), "no samples; leave it out"),
    "no samples in two channels": (np.zeros((2, 0), np.float32), "no samples; leave it out"),
    "no channels": (np.zeros((0, 5), np.float32), "no samples; leave it out"),
    "NaN": (np.array([0.0, np.nan]), "NaN.*; decode it again or leave it out"),
    "infinity": (np.array([0.0, np.inf]), "infinity.*; decode it again or leave it out"),
    "minus infinity": (np.array([[0.0], [-np.inf]], np.float16), "infinity.*; decode it again or leave it out"),
    "beyond float32": (np.array([0.0, 1e300]), "absurd numbers; decode it again or leave it out"),
    "square beyond float32": (np.array([0.0, -1e30], np.float32), "absurd numbers; decode it again or leave it out"),
    "turned": (np.zeros((RATE, 2), np.float32), r"\[16000, 2\]; give \[samples\] or \[channels, samples\]"),
    "no axis": (np.zeros((), np.float32), r"\[\]; give \[samples\] or \[channels, samples\]"),
    "three axes": (np.zeros((1, 2, 9), np.float32), r"\[1, 2, 9\]; give \[samples\] or \[channels, samples\]"),
    "bool": (np.zeros(9, bool), "bool; give floats"),
    "complex": (np.zeros(9, complex), "complex128; give floats"),
    "unsigned": (np.zeros(9, np.uint16), "uint16; give floats"),
    "text": (np.array(["a"]), "<U1; give floats"),
    "objects": (np.array([None]), "object; give floats"),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_sound_is_refused(name):
    samples, problem = WRONG[name]
    with warnings.catch_warnings(action="error"), pytest.raises(UserError, match=f"^a.wav: .*{problem}") as caught:
        hubert_waveform(samples, RATE, "a.wav")
    assert "\n" not in str(caught.value)


@pytest.mark.smoke
@pytest.mark.parametrize("rate", [0, -16000, 1, 999, 1_000_001, 10**12])
def test_what_is_no_rate_is_refused(rate):
    with pytest.raises(UserError, match=f"^a.wav: a sample rate of {rate}; give a whole number of samples a second"):
        hubert_waveform(sine(440, RATE), rate, "a.wav")
