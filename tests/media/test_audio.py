"""Sound for HuBERT: against Hugging Face's feature extractor on real speech, at every rate and in every form, and out
of files of every kind."""

import tracemalloc
import warnings
import wave

import numpy as np
import pytest

from emollama_jax.errors import UserError
from emollama_jax.media.audio import hubert_waveform, mono, read_sound, resample
from tests.media.hostile import MAKERS, TONE, Sound, pictures, spoil, tone, write, write_hostile_files

av = pytest.importorskip("av")

RATE = 16000


def sine(frequency, rate, seconds=1.0):
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


@pytest.fixture(scope="module")
def speech(real_media):
    """The sound of a real video: 8.7 s, as int16."""
    samples = np.rint(read_sound(real_media.clips[0]) * 32767).astype(np.int16)
    assert 8 * RATE < len(samples) < 9 * RATE and np.abs(samples).max() > 3000
    return samples


def test_real_speech_is_as_hugging_face_prepares_it(speech):
    transformers = pytest.importorskip("transformers")
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=True)
    ours = hubert_waveform(speech, RATE)
    theirs = extractor(speech / np.float32(32768), sampling_rate=RATE, return_tensors="np")["input_values"][0]
    assert ours.dtype == theirs.dtype == np.float32 and ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-5


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


@pytest.mark.parametrize("rate", [24000, 44100, 48000])
def test_a_tone_too_high_for_16_khz_is_gone(rate):
    assert np.abs(resample(sine(10000, rate), rate))[200:-200].max() < 0.002


@pytest.mark.parametrize("rate", [8000, 22050, 44100])
@pytest.mark.parametrize("samples", [1, 2, 999, 4410])
def test_the_length_is_that_of_the_time(rate, samples):
    assert len(hubert_waveform(np.ones(samples, np.float32), rate)) == -(-samples * RATE // rate)


def test_16_khz_is_left_as_it_is():
    samples = sine(7900, RATE)
    assert np.array_equal(resample(samples, RATE), samples)


STEPS = np.arange(-128, 128)  # samples that every form can hold


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


@pytest.mark.parametrize("scale, dtype", [(1, np.float32), (2**15, np.int16)])
def test_channels_become_their_mean(scale, dtype):
    channels = (np.array([[0.5, -0.25, 0.0], [0.25, 0.25, 0.5]]) * scale).astype(dtype)
    assert mono(channels).tolist() == [0.375, 0.0, 0.25]


def test_loud_channels_do_not_wrap_around():
    assert mono(np.full((2, 4), 32767, np.int16)).tolist() == [32767 / 32768] * 4


@pytest.mark.parametrize("rate", [8000, RATE, 44100])
@pytest.mark.parametrize("value", [0.0, 0.1, -1.0])
def test_silence_stays_finite(rate, value):
    with warnings.catch_warnings(action="error"):
        ours = hubert_waveform(np.full(rate, value, np.float32), rate)
    assert np.isfinite(ours).all()
    if rate == RATE or not value:  # a constant begins and ends, which a filter hears
        assert np.abs(ours).max() < 1e-3


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


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_sound_is_refused(name):
    samples, problem = WRONG[name]
    with warnings.catch_warnings(action="error"), pytest.raises(UserError, match=f"^a.wav: .*{problem}") as caught:
        hubert_waveform(samples, RATE, "a.wav")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rate", [0, -16000, 1, 999, 1_000_001, 10**12])
def test_what_is_no_rate_is_refused(rate):
    with pytest.raises(UserError, match=f"^a.wav: a sample rate of {rate}; give a whole number of samples a second"):
        hubert_waveform(sine(440, RATE), rate, "a.wav")


# -- out of files


TABLE = {name: file for name, file in MAKERS.items() if name not in ("4k", "two hours", "too large")}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_hostile_files(tmp_path_factory.mktemp("hostile"), *TABLE)


def onset(samples):
    """The second at which the tone begins."""
    return int(np.argmax(np.abs(samples) > 0.1)) / RATE


@pytest.mark.parametrize("name", TABLE)
def test_every_file_gives_its_sound_or_none_or_one_line(files, name):
    file = files[name]
    try:
        sound = read_sound(file.path)
    except UserError as error:
        assert file.frames == 0 and str(file.path) in str(error) and "\n" not in str(error)
        return
    if file.sound is None:
        assert sound is None
        return
    assert sound.dtype == np.float32 and len(sound) / RATE == pytest.approx(file.sound, abs=0.02)
    if name == "silence":
        assert np.abs(sound).max() < 1e-4
        return
    heard = sound[round(onset(sound) * RATE) + 800 :][:3200]
    peak = np.argmax(np.abs(np.fft.rfft(heard))) * RATE / len(heard)
    assert peak == pytest.approx(TONE, abs=10)
    assert np.abs(heard).max() == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("seconds", [0.01, 0.3, 0.777, 5.0])
def test_as_much_as_is_wanted(files, seconds):
    whole, part = read_sound(files["mkv"].path), read_sound(str(files["mkv"].path), seconds)
    assert len(part) == min(round(seconds * RATE), len(whole))
    assert np.array_equal(part, whole[: len(part)])


def test_sound_and_pictures_share_their_start(files):
    assert onset(read_sound(files["sound late"].path)) == pytest.approx(0.5, abs=0.07)  # the codec sounds earlier
    assert onset(read_sound(files["video late"].path)) < 0.005


@pytest.mark.parametrize("late", [-0.5, 0.0, 0.25, 1.25])
@pytest.mark.parametrize("name", ["a.mkv", "a.mov"])
def test_a_tone_is_heard_at_its_time_to_the_millisecond(tmp_path, name, late):
    """Of PCM, which has no codec's delay. Below 0 it is the video that begins late."""
    path = write(
        tmp_path / name,
        pictures(50),
        stamps=lambda i: i / 25 + max(-late, 0),
        sound=Sound(tone(1, 48000), 48000, start=max(late, 0), codec="pcm_s16le"),
    )
    sound = read_sound(path)
    assert len(sound) == pytest.approx((1 + late) * RATE, abs=20)
    assert onset(sound) == pytest.approx(max(late, 0), abs=0.002)


@pytest.mark.parametrize("rate", [8000, 11025, 24000, 44100, 48000])
def test_a_file_sounds_as_its_samples_do(tmp_path, rate):
    """Resampled on the way as `resample` does at once."""
    chirp = np.sin(np.cumsum(np.linspace(0.02, 0.8, rate))).astype(np.float32) * 0.5
    path = write(tmp_path / "a.wav", [], sound=Sound(chirp[None], rate, codec="pcm_s16le"))
    sound, expected = read_sound(path), resample(chirp, rate)
    assert len(sound) == pytest.approx(len(expected), abs=2)
    inside = slice(200, 15800)
    assert np.abs(sound[inside] - expected[inside]).max() < 0.01


@pytest.mark.parametrize(
    "layout, weights",
    [("mono", [1]), ("stereo", [1, 1]), ("5.1", [0.7071, 0.7071, 1, 0, 0.5, 0.5])],
)
def test_channels_are_mixed_by_their_places_and_do_not_clip(tmp_path, layout, weights):
    weights = np.array(weights) / sum(weights)
    for channel, weight in enumerate(weights):
        samples = np.zeros((len(weights), RATE), np.float32)
        samples[channel] = tone(1)[0]
        path = write(tmp_path / "a.wav", [], sound=Sound(samples, codec="pcm_s16le", layout=layout))
        assert np.abs(read_sound(path)).max() == pytest.approx(0.4 * weight, abs=0.01)
    loud = np.ones((len(weights), RATE), np.float32)
    path = write(tmp_path / "a.wav", [], sound=Sound(loud, codec="pcm_s16le", layout=layout))
    assert np.abs(read_sound(path)).max() == pytest.approx(1, abs=1e-3)


def test_what_cannot_be_decoded_is_silence(tmp_path):
    path = write(tmp_path / "a.mp4", pictures(75), sound=Sound(tone(3)))
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        packets = [(p.pos, p.size) for p in file.demux(audio=0) if p.size]
    third = len(packets) // 3
    for place, size in packets[third : 2 * third]:
        data[place : place + size] = b"\xff" * size
    path.write_bytes(data)
    sound = read_sound(path)
    assert len(sound) / RATE == pytest.approx(3, abs=0.02)
    loud = np.abs(sound).reshape(-1, 1600).max(axis=1) > 0.3
    assert loud[:9].all() and not loud[12:18].any() and loud[22:29].all()


LEVELS = (0.1, 0.2, 0.3)
NONE, DEFAULT, COMMENT = 0, av.stream.Disposition.default.value, av.stream.Disposition.comment.value


def test_the_first_stream_that_sounds_is_taken(tmp_path):
    path = write_tracks(tmp_path / "a.mkv", (tone(0.2) / 2, NONE), (tone(0.2), NONE))
    assert np.abs(read_sound(path)).max() == pytest.approx(0.2, abs=0.01)
    spoil(path, "audio")
    assert np.abs(read_sound(path)).max() == pytest.approx(0.4, abs=0.01)


def write_tracks(path, *tracks):
    """A file of sound tracks: (samples, disposition)."""
    with av.open(str(path), "w") as file:
        streams = [file.add_stream("flac", rate=RATE, layout="mono") for _ in tracks]
        for stream, (_, disposition) in zip(streams, tracks, strict=True):
            stream.disposition = disposition
        for stream, (samples, _) in zip(streams, tracks, strict=True):
            pcm = np.rint(samples * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout="mono")
            frame.sample_rate, frame.pts = RATE, 0
            file.mux([*stream.encode(frame), *stream.encode(None)])
    return path


@pytest.mark.parametrize(
    ("dispositions", "silent", "heard"),
    [
        ((COMMENT, DEFAULT, NONE), (), 1),
        ((COMMENT | DEFAULT, NONE, NONE), (), 1),
        ((NONE, NONE, DEFAULT), (), 2),
        ((NONE, NONE, NONE), (), 0),
        ((DEFAULT, NONE, NONE), (0,), 1),
        ((COMMENT, NONE, NONE), (1, 2), 0),
    ],
)
def test_the_track_that_is_meant_is_heard_and_none_that_is_silent(tmp_path, dispositions, silent, heard):
    tracks = [(tone(0.2) * level * (i not in silent) / 0.4, dispositions[i]) for i, level in enumerate(LEVELS)]
    sound = read_sound(write_tracks(tmp_path / "a.mkv", *tracks))
    assert np.abs(sound).max() == pytest.approx(LEVELS[heard], abs=0.01)


def test_channels_that_are_each_others_opposite_are_no_silence(tmp_path):
    samples = tone(0.5)[0] * np.array([[1], [-0.99]], np.float32)
    sound = read_sound(write(tmp_path / "a.wav", [], sound=Sound(samples, codec="pcm_s16le", layout="stereo")))
    assert np.abs(sound - tone(0.5)[0]).max() < 1e-3


@pytest.mark.parametrize("channels", [20, 40])
def test_more_channels_than_a_layout_names_are_averaged(tmp_path, channels):
    samples = np.zeros((channels, RATE // 2), np.float32)
    samples[::2] = tone(0.5)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((channels, 2, RATE, 0, "NONE", ""))
        file.writeframes(np.rint(samples.T * 32767).astype("<i2").tobytes())
    assert np.abs(read_sound(tmp_path / "a.wav") - tone(0.5)[0] / 2).max() < 1e-3


def test_lost_packets_shift_nothing(tmp_path):
    """Each as long as what time stamps may drift."""
    samples = np.zeros((1, 2 * 48000), np.float32)
    samples[:, 72000:] = tone(0.5, 48000)
    path = write(tmp_path / "whole.mkv", [], sound=Sound(samples, 48000, codec="libopus"))
    with av.open(str(path)) as source, av.open(str(tmp_path / "gaps.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.audio[0])
        for number, packet in enumerate(packet for packet in source.demux(audio=0) if packet.size):
            if number not in (20, 30, 31, 32, 50):
                packet.stream = stream
                target.mux(packet)
    whole, gaps = read_sound(path), read_sound(tmp_path / "gaps.mkv")
    assert onset(gaps) == pytest.approx(onset(whole), abs=0.002) and onset(whole) == pytest.approx(1.5, abs=0.01)


def test_sound_of_which_nothing_can_be_decoded(tmp_path):
    path = write(tmp_path / "a.mkv", pictures(5), sound=Sound(tone(1), codec="flac"))
    spoil(path, "audio")
    with pytest.raises(UserError, match="^not a video, or damaged or cut short: .*a.mkv; copy it again"):
        read_sound(path)


def test_an_absurd_time_stamp_is_no_silence_of_days(tmp_path):
    path = write(tmp_path / "a.mkv", pictures(5), sound=Sound(tone(1), start=1e6, codec="pcm_s16le"))
    assert len(read_sound(path)) == pytest.approx(RATE, abs=20)


def test_memory_is_that_of_the_result(tmp_path):
    path = write(tmp_path / "a.wav", [], sound=Sound(tone(60, 48000, 2), 48000, codec="pcm_s16le", layout="stereo"))
    assert path.stat().st_size > 11_000_000
    tracemalloc.start()
    sound = read_sound(path, 2.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(sound) == 2 * RATE and peak < 4 * sound.nbytes


def test_the_sound_of_real_clips_is_as_long_as_the_file_says(real_clips):
    for name, path in real_clips.items():
        sound = read_sound(path)
        with av.open(str(path)) as file:
            stream = file.streams.audio[0]
            seconds = float(stream.duration * stream.time_base)
        print(f"{name}: {len(sound) / RATE:.4f} s of sound, {seconds:.4f} s by the file")
        assert stream.start_time == 0 and len(sound) / RATE == pytest.approx(seconds, abs=0.02)
        assert (np.abs(sound).max() > 0.05) == (name not in ("WolfgangLanger_Pexels", "single_face"))
