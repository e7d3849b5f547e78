"""Labels under seven views from two prefills: each as if the view were scored alone, at less than thrice the price."""

import dataclasses

import numpy as np
import pytest

from emollama_jax.config import Config
from emollama_jax.data.modalities import VIEWS
from emollama_jax.infer.answer import ClipError, Query
from emollama_jax.infer.clip_input import ClipInput
from emollama_jax.infer.predictor import Predictor
from emollama_jax.infer.score import LabelScorer
from emollama_jax.infer.views import view_prompts
from emollama_jax.text.prompts import PromptConfig
from tests.data.prepared import TOKENIZER
from tests.infer.test_predictor import clips, config, model, paths, records  # noqa: F401 (fixtures)


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
    assert read(together) < read(alone) if orders == 1 else read(together) <= read(alone)


def test_a_subset_of_views_and_a_clip_that_fails(model, config, clips):  # noqa: F811
    short = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=200))
    predictor = Predictor(model, TOKENIZER, short)
    long = dataclasses.replace(clips[1], subtitle="so " * 200)
    first, bad, last = predictor.answer_views([clips[0], long, clips[2]], ["A", "VT"])
    assert isinstance(bad, ClipError) and bad.stage == "prompt"
    assert list(first) == ["A", "VT"] and (first["A"].name, last["VT"].name) == ("clip 0", "clip 2")
    (alone,) = Predictor(model, TOKENIZER, short, modalities="VT").answer([Query(clips[0])])
    assert first["VT"].probabilities == pytest.approx(alone.probabilities, abs=1e-4)


def test_the_real_layout_costs_less_than_three_views(model):  # noqa: F811
    """256 image tokens, a question of nine labels, a subtitle of 17 words: the tokens are counted, nothing is run."""
    scorer = LabelScorer(model.llama, TOKENIZER, PromptConfig())
    said = "I did not think that you would come, and now that you are here I am glad."
    clip = ClipInput("a", said, np.zeros((3, 4), np.float32), np.ones(3, bool), image_tokens=np.zeros((2, 2)))
    seven = 0
    for views in (["AVT", "AV", "VT", "V"], ["AT", "A", "T"]):
        asked = [sum((view_prompts(scorer, clip, view, 256, (258, 260), Config()) for view in views), [])] * 16
        seven += scorer.count_tokens(asked, one_prefix="V" not in views[0])
    one = scorer.count_tokens([scorer.prompts(said, (True,) * 3, 256)] * 16)
    print(f"{seven / one:.2f} times one view")
    assert 1.5 < seven / one < 3
