"""Labels under seven views from two prefills: each as if the view were scored alone, at less than thrice the price."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from emollama_jax.config import Config
from emollama_jax.data.modalities import VIEWS
from emollama_jax.infer.answer import ClipError, Query
from emollama_jax.infer.clip_input import ClipInput
from emollama_jax.infer.predictor import Predictor
from emollama_jax.infer.score import LabelScorer
from emollama_jax.infer.views import score_views
from emollama_jax.text.prompts import PromptConfig
from tests.data.prepared import TOKENIZER
from tests.infer.test_predictor import clips, config, model, paths, records  # noqa: F401 (fixtures)
from tests.models.tiny import random_llama, tiny_config


@pytest.mark.parametrize(("missing", "orders"), [("zeros", 1), pytest.param("omit", 2, marks=pytest.mark.slow)])
def test_each_view_is_as_if_it_were_alone(model, config, clips, missing, orders):  # noqa: F811
    config = dataclasses.replace(config, prompt=dataclasses.replace(config.prompt, missing=missing))
    some = clips[:3]  # of these, one has no motion, another no voice
    predictor = Predictor(model, TOKENIZER, config, orders=orders)
    together, alone = predictor.view_labels(some, VIEWS), {}
    for view in VIEWS:
        single = Predictor(model, TOKENIZER, config, orders=orders, modalities=view)
        alone[view] = single.labels(some, single.soft_tokens(some))
        np.testing.assert_allclose(together[view].log_likelihoods, alone[view].log_likelihoods, atol=5e-5)
        np.testing.assert_allclose(together[view].by_order, alone[view].by_order, atol=1e-5)
    spread = np.ptp([scores.log_likelihoods for scores in together.values()], axis=0)
    assert spread.max() > 0.02  # the views differ
    read = lambda scores: sum(found.tokens.sum() for found in scores.values())
    assert read(together) < read(alone)


def test_a_subset_of_views_and_a_clip_that_fails(model, config, clips):  # noqa: F811
    short = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=200))
    predictor = Predictor(model, TOKENIZER, short)
    long = dataclasses.replace(clips[1], subtitle="so " * 200)
    first, bad, last = predictor.answer_views([clips[0], long, clips[2]], ["A", "VT"])
    assert isinstance(bad, ClipError) and bad.stage == "prompt"
    assert list(first) == ["A", "VT"] and (first["A"].name, last["VT"].name) == ("clip 0", "clip 2")
    (alone,) = Predictor(model, TOKENIZER, short, modalities="VT").answer([Query(clips[0])])
    assert first["VT"].probabilities == pytest.approx(alone.probabilities, abs=1e-4)


def test_views_without_an_image_are_not_mixed_up(model, config, clips):  # noqa: F811
    """Where only the voice is heard, clips differ by it alone."""
    predictor = Predictor(model, TOKENIZER, config)
    found = predictor.view_labels(clips[:3], ["A"])["A"].log_likelihoods
    alone = [predictor.view_labels([clip], ["A"])["A"].log_likelihoods[0] for clip in clips[:3]]
    np.testing.assert_allclose(found, alone, atol=5e-5)
    assert np.abs(np.diff(found, axis=0)).max() > 0.001


def test_the_real_layout_costs_less_than_three_views():
    """256 image tokens, a question of nine labels, a subtitle of 17 words: tokens read, and with padding."""
    scorer = LabelScorer(random_llama(tiny_config(vocab_size=640)), TOKENIZER, PromptConfig())
    said = "I did not think that you would come, and now that you are here I am glad."
    clip = ClipInput("a", said, np.zeros((3, 4), np.float32), np.ones(3, bool), image_tokens=np.zeros((2, 2)))
    soft = jnp.asarray(np.random.default_rng(0).normal(size=(4, 260, 24)), jnp.float32)
    one = scorer.score([said] * 4, soft).tokens
    seven = score_views(scorer, [clip] * 4, VIEWS, soft, soft[:1], Config())
    ratios = sum(scores.tokens for scores in seven.values()) / one
    print(f"{ratios[0]:.2f} times one view")
    assert (1.5 < ratios).all() and (ratios < 2.6).all()
