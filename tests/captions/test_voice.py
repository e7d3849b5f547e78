"""The measured tone: of tones that were made, whose pitch, pauses and loudness are known, and of synthetic voices."""

import numpy as np
import pytest

from emollama_jax.captions.voice import TYPICAL, describe_voice, find_norms, join, measure_voice
from emollama_jax.synthetic.clip import clip_spec, clip_voice

RATE = 16000


def tone(hertz, seconds=1.0, loud=0.1):
    """A buzz of eight harmonics."""
    time = np.arange(round(seconds * RATE)) / RATE
    wave = sum(np.sin(2 * np.pi * hertz * k * time) / k for k in range(1, 9))
    return (loud * wave / np.sqrt(np.mean(wave**2))).astype(np.float32)


@pytest.mark.parametrize("hertz", [80, 120, 200, 350])
def test_the_pitch_and_loudness_of_a_buzz(hertz):
    measures = measure_voice(tone(hertz))
    assert 55 * 2 ** (measures["pitch"] / 12) == pytest.approx(hertz, rel=0.02)
    assert measures["loudness"] == pytest.approx(-20, abs=0.5) and measures["range"] < 0.5 and measures["breath"] < 0.1


def test_pauses_and_a_pitch_that_rises():
    silence = np.zeros(RATE // 2, np.float32)
    measures = measure_voice(np.concatenate([tone(100, 0.5), silence, tone(150, 0.5)]))
    assert measures["pauses"] == pytest.approx(1 / 3, abs=0.06) and measures["rise"] == pytest.approx(7.02, abs=0.5)


def test_noise_and_silence_are_no_voice():
    assert measure_voice(np.zeros(RATE, np.float32)) is None and measure_voice(np.zeros(10, np.float32)) is None
    assert measure_voice(np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)) is None
    assert measure_voice(tone(67, loud=0.001)) is None  # hum
    assert describe_voice(None, TYPICAL) == ""


def test_synthetic_voices_are_described_as_they_were_made():
    specs = [clip_spec("train", i, seed=8) for i in range(60)]
    voices = [measure_voice(clip_voice(spec)) for spec in specs]
    norms = find_norms(voices)
    words = {level: [] for level in ("lively", "hushed", "firm", "unclear")}
    for spec, measures in zip(specs, voices, strict=True):
        words[spec.factors.voice].append(describe_voice(measures, norms))
    says = lambda level, word: np.mean([word in text for text in words[level]])
    assert says("lively", "high") > 0.9 and says("hushed", "high") == says("firm", "high") == 0
    assert says("hushed", "quiet") > 0.9 and says("firm", "quiet") == says("lively", "quiet") == 0
    assert says("hushed", "breathy") > 0.9 and says("firm", "breathy") == 0


def test_few_voices_are_compared_with_usual_speech_and_what_is_usual_is_not_said():
    assert find_norms([{name: 0.0 for name in TYPICAL}] * 7) is TYPICAL
    usual = {name: norm.middle for name, norm in TYPICAL.items()}
    assert describe_voice(usual, TYPICAL) == "a voice of usual pitch, loudness and pace"
    assert describe_voice({**usual, "pitch": 40.0, "pauses": 0.0}, TYPICAL) == "a very high voice with hardly a pause"


def test_lists_in_words():
    assert [join(parts) for parts in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
