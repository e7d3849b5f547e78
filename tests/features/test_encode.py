"""Batches through the encoders: a clip's feature is that of the clip alone, by few compiled programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax.config import load_config
from emollama_jax.errors import UserError
from emollama_jax.features import encode
from emollama_jax.features.encode import BUCKETS, encode_audio, encode_images
from emollama_jax.media.audio import SAMPLE_RATE, standardize
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.models.hubert import Hubert
from emollama_jax.models.mae import Mae
from emollama_jax.models.videomae import VideoMae
from emollama_jax.sharding import abstract

TINY = load_config("tiny")
LONGEST = BUCKETS[-1] * SAMPLE_RATE
BASE = {"conv_norm": "group", "conv_bias": False, "norm_first": False}  # HuBERT-base's form


def random_model(kind, config):
    """A model whose biases and norms matter too: zeros that are padded do not stay zeros."""
    graphdef, state = abstract(lambda: kind(config, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    for (*_, name), variable in nnx.to_flat_state(state):
        like = variable.get_value()
        noise = random.normal(size=like.shape).astype(np.float32)
        if name == "scale":
            noise = 1 + 0.3 * noise
        else:
            noise *= 0.7 * like.shape[-2] ** -0.5 if name == "kernel" else 0.3
        variable.set_value(jnp.asarray(noise, like.dtype))
    return nnx.merge(graphdef, state)


def alone(model, *clips):
    """The model's own answers, one clip at a time and without any padding; a clip is a tuple of its inputs."""
    graphdef, state = nnx.split(model)
    compiled = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state).encode(*inputs))
    return np.concatenate([compiled(state, *(np.asarray(x)[None] for x in clip)) for clip in clips])


def waveforms(*lengths, seed=1):
    """Standardised noise that swells, so that no part of a clip is like another."""
    random = np.random.default_rng(seed)
    return [standardize((random.normal(size=n) * np.linspace(0.2, 1, n)).astype(np.float32)) for n in lengths]


def programs(function, *arguments, **settings):
    """How many programs a call compiled."""
    before = encode.run_encoder._cache_size()
    function(*arguments, **settings)
    return encode.run_encoder._cache_size() - before


IMAGES = {
    "eva_vit": (EvaVit, (56, 56, 3), (17, 48)),
    "mae": (Mae, (32, 32, 3), (32,)),
    "videomae": (VideoMae, (4, 32, 32, 3), (32,)),
}


@pytest.fixture(scope="module", params=IMAGES)
def images(request):
    """A model, five images or clips for it, and the features of each alone."""
    kind, shape, features = IMAGES[request.param]
    model = random_model(kind, getattr(TINY, request.param))
    pixels = np.random.default_rng(1).integers(0, 256, (5, *shape), dtype=np.uint8)
    expected = alone(model, *((image,) for image in pixels))
    assert expected.shape == (5, *features)
    return model, pixels, expected


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_features_of_images_do_not_depend_on_the_batch(images, batch_size):
    model, pixels, expected = images
    ours = encode_images(model, pixels, batch_size=batch_size)
    assert isinstance(ours, np.ndarray) and ours.dtype == np.float32 and ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= 1e-5
    order = [3, 0, 4, 4, 2]
    ours = encode_images(model, pixels[order], batch_size=batch_size)
    assert np.abs(ours - expected[order]).max() <= 1e-5


def test_other_images_have_other_features(images):
    *_, expected = images
    assert min(np.abs(expected[i] - expected[j]).max() for i in range(5) for j in range(i)) > 0.01


def test_no_images_have_no_features(images):
    model, pixels, expected = images
    ours = encode_images(model, pixels[:0])
    assert ours.dtype == np.float32 and ours.shape == (0, *expected.shape[1:])


def test_images_of_any_number_share_their_programs():
    model = random_model(Mae, dataclasses.replace(TINY.mae, num_layers=1))
    pixels = np.zeros((21, 32, 32, 3), np.uint8)
    assert programs(encode_images, model, pixels, batch_size=4) == 2  # five batches of four, and one alone
    for count in (21, 20, 9, 5, 4, 3):
        assert programs(encode_images, model, pixels[:count], batch_size=4) == 0
    other = random_model(Mae, dataclasses.replace(TINY.mae, num_layers=1))
    assert programs(encode_images, other, pixels, batch_size=4) == 0


def test_batches_on_a_cpu_are_filled(monkeypatch):
    """A row of padding would take as long as an image."""
    rows, run = [], encode._run
    monkeypatch.setattr(encode, "_run", lambda *args: rows.append(len(args[-1])) or run(*args))
    model = random_model(Mae, dataclasses.replace(TINY.mae, num_layers=1))
    encode_images(model, np.zeros((38, 32, 32, 3), np.uint8), batch_size=32)
    assert rows == [16, 16, 4, 1, 1]


def test_features_of_a_model_in_bfloat16_are_float32():
    config = dataclasses.replace(TINY.mae, compute_dtype="bfloat16", kernel_dtype="bfloat16")
    ours = encode_images(random_model(Mae, config), np.full((1, 32, 32, 3), 9, np.uint8))
    assert ours.dtype == np.float32 and np.isfinite(ours).all()


LENGTHS = (400, 16000, 16001, 40123)  # one frame, the end of a bucket, what is just beyond, and any


@pytest.fixture(scope="module", params=[{}, BASE], ids=["large", "base"])
def clips(request):
    """A HuBERT of either form, clips of different lengths, and the feature of each alone."""
    model = random_model(Hubert, dataclasses.replace(TINY.hubert, **request.param))
    audio = waveforms(*LENGTHS)
    return model, audio, alone(model, *((clip, np.int32(len(clip))) for clip in audio))


@pytest.mark.parametrize(
    "order, batch_seconds",
    [
        ([0, 1, 2, 3], 64),
        ([3, 1, 0, 2], 64),
        ([3, 1, 0, 2], 1),  # each clip in a batch of its own
        ([0, 3, 1, 0, 1], 2),  # more clips of one bucket than a batch holds
    ],
)
def test_features_of_audio_do_not_depend_on_the_batch(clips, order, batch_seconds):
    model, audio, expected = clips
    ours = encode_audio(model, [audio[i] for i in order], batch_seconds=batch_seconds)
    assert isinstance(ours, np.ndarray) and ours.dtype == np.float32 and ours.shape == (len(order), 32)
    assert np.abs(ours - expected[order]).max() <= 1e-5


def test_features_of_audio_do_not_depend_on_the_bucket(clips, monkeypatch):
    model, audio, expected = clips
    monkeypatch.setattr(encode, "BUCKETS", (4,))
    assert np.abs(encode_audio(model, audio) - expected).max() <= 1e-5


def test_other_clips_have_other_features(clips):
    *_, expected = clips
    assert min(np.abs(expected[i] - expected[j]).max() for i in range(4) for j in range(i)) > 0.01


def test_no_clips_have_no_features(clips):
    ours = encode_audio(clips[0], [])
    assert ours.dtype == np.float32 and ours.shape == (0, 32)


def test_silence_has_a_feature(clips):
    assert np.isfinite(encode_audio(clips[0], [np.zeros(9000, np.float32)])).all()


@pytest.fixture(scope="module")
def small():
    """A HuBERT that is compiled fast."""
    sizes = {"num_layers": 1, "hidden_size": 16, "intermediate_size": 16, "conv_dims": (8,) * 7}
    return random_model(Hubert, dataclasses.replace(TINY.hubert, **sizes))


@pytest.mark.slow
def test_clips_of_any_length_share_their_programs(small):
    lengths = np.random.default_rng(2).integers(400, 2 * SAMPLE_RATE, 40)
    audio = waveforms(*lengths)
    used = {next(seconds for seconds in BUCKETS if n <= seconds * SAMPLE_RATE) for n in lengths}
    assert len(used) == 3
    assert programs(encode_audio, small, audio, batch_seconds=8) == len(used) <= len(BUCKETS)
    assert programs(encode_audio, small, audio[::-1], batch_seconds=8) == 0


@pytest.mark.smoke
def test_a_batch_holds_no_more_than_asked_for_and_all_clips_once(small, monkeypatch):
    """With the model replaced by one that tells the first sample and the length of each row."""
    shapes = []

    def first_and_length(graphdef, state, rows, lengths):
        shapes.append(rows.shape)
        for row, length in zip(rows, lengths, strict=True):
            assert not row[length:].any() and length >= 400
        return np.repeat(rows[:, :1] * 1e6 + lengths[:, None], 16, axis=1)

    monkeypatch.setattr(encode, "run_encoder", first_and_length)
    lengths = [*np.random.default_rng(3).integers(400, LONGEST // 8, 60), LONGEST]
    audio = [np.full(n, i, np.float32) for i, n in enumerate(lengths)]
    ours = encode_audio(small, audio, batch_seconds=20)
    assert ours[:, 0].tolist() == [np.float32(i * 1e6 + n) for i, n in enumerate(lengths)]
    for rows, samples in shapes:
        assert samples / SAMPLE_RATE in BUCKETS
        assert rows == 1 or rows * samples <= 20 * SAMPLE_RATE
    assert len({samples for _, samples in shapes}) == len(set(shapes)), "one number of rows a length"


def test_every_bucket_fits_closely(small):
    assert list(BUCKETS) == sorted(set(BUCKETS))
    for below, seconds in zip(BUCKETS, BUCKETS[1:], strict=False):
        assert encode._bucket(small, np.zeros(int(below * SAMPLE_RATE), np.float32), 0) == below
        assert encode._bucket(small, np.zeros(int(below * SAMPLE_RATE) + 1, np.float32), 0) == seconds
        assert below / seconds >= 2 / 3
    assert encode._bucket(small, np.zeros(400, np.float32), 0) == BUCKETS[0]
    assert encode._bucket(small, np.zeros(LONGEST, np.float32), 0) == BUCKETS[-1]


@pytest.mark.parametrize(
    "length, problem",
    [
        (0, "0 samples of audio, fewer than one frame's 400; leave it out"),
        (10, "10 samples of audio, fewer than one frame's 400; leave it out"),
        (399, "399 samples of audio, fewer than one frame's 400; leave it out"),
        (LONGEST + 1, "128 s of audio, more than 128 s; cut it shorter"),
        (LONGEST * 2, "256 s of audio, more than 128 s; cut it shorter"),
    ],
)
def test_clips_too_short_or_too_long_are_refused_before_any_is_encoded(small, monkeypatch, length, problem):
    monkeypatch.setattr(encode, "run_encoder", lambda *_: pytest.fail("a clip was encoded"))
    with pytest.raises(UserError) as caught:
        encode_audio(small, [np.zeros(9000, np.float32), np.zeros(length, np.float32)])
    assert str(caught.value) == f"clip 1: {problem}"
