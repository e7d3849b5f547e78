"""The next token against Hugging Face's logits processors, by the draw and by its distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from emollama_jax.config import GenerateConfig
from emollama_jax.infer.sampling import Sampling, sample

VOCAB, DRAWS = 40, 4000

compiled_sample = jax.jit(sample)


def compiled(logits, seen, step, sampling):
    """`sample` for rows that have all had `step` tokens."""
    return compiled_sample(logits, seen, jnp.full(len(logits), step, jnp.int32), sampling)


def draws(logits, config, *, seen=(), step=0, seeds=range(DRAWS)):
    """One token a seed from the same logits; tokens beyond those given are impossible."""
    row, marks = np.full(VOCAB, -np.inf, np.float32), np.zeros(VOCAB, bool)
    row[: len(logits)], marks[: len(seen)] = logits, seen
    rows, marks = (jnp.broadcast_to(x, (len(seeds), VOCAB)) for x in (row, marks))
    return np.asarray(compiled(rows, marks, step, Sampling.of([config] * len(seeds), seeds)))


def rows_of_everything(count):
    """Random logits of different spreads, seen tokens, and a setting and a seed for each row."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(count, VOCAB)) * rng.choice([0.3, 2.0, 10.0], size=(count, 1))
    seen = rng.random((count, VOCAB)) < 0.4
    configs = [
        GenerateConfig(
            temperature=float(rng.choice([0.0, 0.3, 1.0, 1.7])),
            top_p=float(rng.choice([0.05, 0.4, 0.7, 0.95, 1.0])),
            repetition_penalty=float(rng.choice([0.7, 1.0, 1.2, 5.0])),
        )
        for _ in range(count)
    ]
    return logits.astype(np.float32), seen, configs, rng.integers(0, 2**32, count).tolist()


def hugging_face_scores(logits, seen, config):
    """Log-probabilities up to a constant [V] after Hugging Face's processors; -inf for what they drop."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    text, scores = torch.tensor(np.flatnonzero(seen))[None], torch.tensor(logits)[None]
    processors = [transformers.RepetitionPenaltyLogitsProcessor(config.repetition_penalty)]
    if config.temperature > 0:
        processors.append(transformers.TemperatureLogitsWarper(config.temperature))
        if config.top_p < 1:
            processors.append(transformers.TopPLogitsWarper(config.top_p))
    for processor in processors:
        scores = processor(text, scores)
    return scores[0].numpy()


def test_every_row_is_the_draw_from_hugging_faces_scores():
    """The draw is the largest of log-probability plus noise: with the same noise, other scores show."""
    count, step = 800, 7
    logits, seen, configs, seeds = rows_of_everything(count)
    ours = np.asarray(compiled(logits, seen, step, Sampling.of(configs, seeds)))

    scores = np.stack([hugging_face_scores(*row) for row in zip(logits, seen, configs, strict=True)])
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(np.asarray(seeds, np.uint32))
    drawn = np.asarray(jax.vmap(jax.random.categorical)(keys, scores))
    greedy = np.array([config.temperature == 0 for config in configs])
    np.testing.assert_array_equal(ours[greedy], scores[greedy].argmax(axis=-1))
    np.testing.assert_array_equal(ours[~greedy], drawn[~greedy])
    assert 100 < greedy.sum() < count - 400
    assert (drawn != scores.argmax(axis=-1)).sum() > 100  # the noise decides, not only the scores


@pytest.mark.parametrize(
    "config",
    [
        GenerateConfig(temperature=1.0),
        GenerateConfig(temperature=0.6, top_p=0.8),
        GenerateConfig(temperature=1.5, top_p=0.95, repetition_penalty=1.4),
    ],
    ids=["plain", "nucleus", "all"],
)
def test_the_frequencies_are_hugging_faces_probabilities(config):
    rng = np.random.default_rng(1)
    logits, seen = rng.normal(size=12).astype(np.float32), np.arange(12) % 3 == 0
    scores = hugging_face_scores(logits, seen, config)
    kept = np.isfinite(scores)
    expected = np.exp(scores[kept].astype(np.float64))
    expected /= expected.sum()

    counts = np.bincount(draws(logits, config, seen=seen), minlength=12)
    assert counts[~kept].sum() == 0
    assert stats.chisquare(counts[kept], expected * DRAWS).pvalue > 1e-3
    assert np.abs(counts[kept] / DRAWS - expected).sum() / 2 < 0.04  # total variation


def test_temperature_zero_takes_the_most_likely_after_the_penalty():
    logits = [1.0, 2.0, 1.9, -5.0]
    assert set(draws(logits, GenerateConfig())) == {1}
    assert set(draws(logits, GenerateConfig(top_p=0.1))) == {1}
    penalised = GenerateConfig(repetition_penalty=1.5)
    assert set(draws(logits, penalised, seen=[False, True, False, False])) == {2}
    negative = [-1.0, -1.2, -9.0, -9.0]  # a penalty makes negative logits more negative
    assert set(draws(negative, penalised, seen=[True, False, False, False])) == {1}


def test_of_equal_logits_the_greedy_choice_is_the_first():
    assert set(draws([0.0, 3.0, 3.0, 1.0, 3.0], GenerateConfig())) == {1}


def test_top_p_one_keeps_every_token():
    logits = np.log([0.98] + [0.02 / 7] * 7)
    assert set(draws(logits, GenerateConfig(temperature=1.0))) == set(range(8))


def test_a_tiny_top_p_keeps_only_the_most_likely():
    logits = np.random.default_rng(2).permutation(np.linspace(0, 0.5, VOCAB))
    for top_p in (1e-30, 1e-6, 0.02):
        config = GenerateConfig(temperature=1.0, top_p=top_p)
        assert set(draws(logits, config)) == {logits.argmax()}


def test_the_nucleus_ends_with_the_token_that_reaches_top_p():
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    for top_p, kept in [(0.39, {1}), (0.41, {1, 3}), (0.69, {1, 3}), (0.71, {1, 3, 2}), (0.91, {0, 1, 2, 3})]:
        config = GenerateConfig(temperature=1.0, top_p=top_p)
        assert set(draws(logits, config)) == kept, top_p


def test_tokens_as_likely_as_the_last_one_kept_are_kept():
    """Which of equals is drawn depends on the noise only, not on the order of the vocabulary."""
    config = GenerateConfig(temperature=1.0, top_p=0.3)
    assert set(draws([0.0, 0.0, 0.0, 0.0, -9.0], config)) == {0, 1, 2, 3}
    assert set(draws([1.0, 1.0, 5.0, 1.0], config)) == {2}


def test_impossible_tokens_stay_impossible():
    logits = [-np.inf, 0.5, -np.inf, 0.0, -np.inf, -np.inf]
    for settings in ({}, {"top_p": 0.9}, {"repetition_penalty": 2.0}, {"repetition_penalty": 0.5, "top_p": 1e-6}):
        for temperature in (0.0, 1e-30, 0.7, 100.0):
            config = GenerateConfig(temperature=temperature, **settings)
            with jax.debug_nans(True), jax.disable_jit():  # so that every step is looked at
                drawn = draws(logits, config, seen=[True, True, False, False, False, True], seeds=range(100))
            assert set(drawn) <= {1, 3}, config
    assert set(draws([-np.inf, -np.inf, -3.0], GenerateConfig(temperature=1.0, top_p=0.5))) == {2}


def test_a_temperature_near_zero_is_greedy():
    logits = np.random.default_rng(3).permutation(np.linspace(-40, 90, VOCAB))
    for temperature in (1e-3, 1e-20, 1e-30):
        for top_p in (0.9, 1.0):
            config = GenerateConfig(temperature=temperature, top_p=top_p)
            assert set(draws(logits, config)) == {logits.argmax()}, config


@pytest.mark.smoke
def test_a_row_does_not_depend_on_the_rows_beside_it():
    logits, seen, configs, seeds = rows_of_everything(24)
    together = compiled(logits, seen, 3, Sampling.of(configs, seeds))
    order = np.random.default_rng(4).permutation(24)
    shuffled = Sampling.of([configs[i] for i in order], [seeds[i] for i in order])
    np.testing.assert_array_equal(compiled(logits[order], seen[order], 3, shuffled), together[order])
    for i in range(24):
        row = slice(i, i + 1)
        assert compiled(logits[row], seen[row], 3, Sampling.of(configs[row], seeds[row]))[0] == together[i]


def test_rows_that_have_had_different_numbers_of_tokens():
    logits, seen, configs, seeds = rows_of_everything(24)
    sampling, steps = Sampling.of(configs, seeds), np.arange(24) % 5
    together = compiled_sample(logits, seen, jnp.asarray(steps, jnp.int32), sampling)
    for step in range(5):
        rows = steps == step
        np.testing.assert_array_equal(compiled(logits, seen, step, sampling)[rows], together[rows])


def test_the_noise_is_of_the_seed_and_the_step():
    config, logits = GenerateConfig(temperature=1.0), np.zeros(VOCAB)
    first = draws(logits, config)
    np.testing.assert_array_equal(draws(logits, config), first)
    for other in (draws(logits, config, step=1), draws(logits, config, seeds=range(2**32 - DRAWS, 2**32))):
        assert abs((other == first).mean() - 1 / VOCAB) < 0.02  # as often as by chance
    assert set(first) == set(range(VOCAB))
