"""Label scores against the likelihood of one label at a time, by a plain forward of the whole text.

The model is random and tiny; the tokenizer is the reference's, of 640 pieces, for which most labels are several tokens.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax.config import DEFAULT_SHARDING
from emollama_jax.data.packing import pack_rows
from emollama_jax.errors import UserError
from emollama_jax.infer import likelihood
from emollama_jax.infer.score import LabelScorer
from emollama_jax.models.emotion_llama import insert_soft_tokens
from emollama_jax.sharding import make_mesh, use_mesh
from emollama_jax.text.labels import DFEW, MER2023, MERR
from emollama_jax.text.prompts import PromptConfig, Sample, Turn, emotion_question, encode_turns, request
from emollama_jax.text.tokenizers import load_tokenizer
from tests.models.tiny import random_llama, tiny_config

IMAGE_TOKENS, SOFT = 4, 8
SUBTITLES = ["", "Oh no.", "Why did nobody call me yesterday?", "I am not sure, thank you"]
PROMPT = PromptConfig(labels=MER2023)


def tiny_model(**changes):
    return random_llama(tiny_config(**{"vocab_size": 640, **changes}))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Path(__file__).parents[1] / "data/reference_tiny/llama")


def soft_of(clips, width=24, seed=3):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(clips, SOFT, width)), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def token_nll(graphdef, state, batch, soft):
    model = nnx.merge(graphdef, state)
    x = insert_soft_tokens(model.embed_tokens(batch.tokens), soft, batch.soft_index)
    hidden = model(x, batch.positions, batch.segment_ids)
    return model.token_nll(hidden, jnp.roll(batch.tokens, -1, axis=1))


def one_at_a_time(model, tokenizer, prompt, orders, labels, subtitles, soft, has_feature=None):
    """Log-likelihoods [N, O, L]: every label behind every clip's whole prompt, in a row of its own."""
    result = np.zeros((len(subtitles), len(orders), len(labels)))
    for n, subtitle in enumerate(subtitles):
        has = (True, True, True) if has_feature is None else has_feature[n]
        for o, order in enumerate(orders):
            turn = Turn(request("emotion", emotion_question(order, prompt.emotion_question)))
            asked = encode_turns(
                tokenizer, [turn], prompt, subtitle=subtitle, has_feature=has, image_tokens=IMAGE_TOKENS
            )
            for i, label in enumerate(labels):
                answer = tokenizer.encode(label.lower(), specials=False)
                answer = np.array([*answer, tokenizer.eos_id], np.int32)
                is_answer = np.concatenate([asked.is_answer, np.ones(len(answer), bool)])
                soft_index = np.concatenate([asked.soft, np.full(len(answer), -1, np.int32)])
                sample = Sample(np.concatenate([asked.tokens, answer]), soft_index, is_answer)
                batch = pack_rows([[sample]], length=256, clips_per_row=1, soft_per_clip=SOFT)
                nll = token_nll(*nnx.split(model), batch, soft[n : n + 1])
                result[n, o, i] = -np.where(batch.loss_weights > 0, nll, 0).sum()
    return result


def assert_as_one_at_a_time(model, tokenizer, prompt, scores, soft, has_feature=None, tolerance=1e-4):
    subtitles = SUBTITLES[: len(soft)]
    inputs = (scores.orders, scores.labels, subtitles, soft, has_feature)
    expected = one_at_a_time(model, tokenizer, prompt, *inputs)
    error = np.abs(scores.log_likelihoods - expected).max()
    print(f"max error {error:.1e} of log-likelihoods down to {expected.min():.1f}")
    assert np.ptp(expected, axis=-1).min() > 0.1  # the labels differ
    assert error <= tolerance


@pytest.mark.smoke
def test_as_one_label_at_a_time(model, tokenizer):
    soft = soft_of(2)
    scores = LabelScorer(model, tokenizer, PROMPT).score(SUBTITLES[:2], soft)
    assert scores.labels == MER2023 and scores.orders == (MER2023,)
    assert_as_one_at_a_time(model, tokenizer, PROMPT, scores, soft)
    likelihoods = np.exp(scores.log_likelihoods)
    np.testing.assert_allclose(scores.by_order, likelihoods / likelihoods.sum(axis=-1, keepdims=True), rtol=1e-9)
    np.testing.assert_array_equal(scores.probabilities, scores.by_order[:, 0])
    assert scores.best == [MER2023[i] for i in likelihoods[:, 0].argmax(axis=-1)]


@pytest.mark.parametrize(
    ("prompt", "orders", "changes"),
    [
        (PromptConfig(labels=DFEW), 7, {}),
        (PromptConfig(labels=MERR, emotion_question="Which one, {labels}?"), 2, {"num_kv_heads": 6}),
        (PromptConfig(labels=MER2023, layout="reference"), 3, {"tie_embeddings": True, "scan_layers": False}),
        (PromptConfig(labels=("Not sure", "sad", "very sad")), 3, {"remat": "full", "kernel_dtype": "int8"}),
    ],
    ids=["all_orders", "some_orders", "reference_layout", "several_words"],
)
def test_as_one_label_at_a_time_under_every_order(tokenizer, prompt, orders, changes):
    model, soft = tiny_model(**changes), soft_of(2)
    scores = LabelScorer(model, tokenizer, prompt, orders=orders).score(SUBTITLES[:2], soft)
    assert len(set(scores.orders)) == orders
    assert_as_one_at_a_time(model, tokenizer, prompt, scores, soft)
    np.testing.assert_allclose(scores.probabilities, scores.by_order.mean(axis=1), rtol=1e-12)
    assert np.ptp(scores.log_likelihoods, axis=1).max() > 1e-3  # the order matters to the model
    for o, best in enumerate(scores.best_by_order):
        assert best == [prompt.labels[i] for i in scores.log_likelihoods[:, o].argmax(axis=-1)]


def test_missing_features_are_left_out(model, tokenizer):
    prompt = dataclasses.replace(PROMPT, missing="omit")
    soft, has_feature = soft_of(2), [(False, True, False), (True, True, True)]
    scores = LabelScorer(model, tokenizer, prompt, orders=2).score(SUBTITLES[:2], soft, has_feature)
    assert_as_one_at_a_time(model, tokenizer, prompt, scores, soft, has_feature)
    everything = LabelScorer(model, tokenizer, prompt, orders=2).score(SUBTITLES[:2], soft)
    assert np.abs(everything.log_likelihoods - scores.log_likelihoods).max(axis=(1, 2)).tolist() != [0, 0]


def test_bfloat16_is_near_float32(model, tokenizer):
    soft = soft_of(2)
    exact = LabelScorer(model, tokenizer, PROMPT, orders=6).score(SUBTITLES[:2], soft)
    half = tiny_model(compute_dtype="bfloat16")
    scores = LabelScorer(half, tokenizer, PROMPT, orders=6).score(SUBTITLES[:2], soft)
    assert_as_one_at_a_time(half, tokenizer, PROMPT, scores, soft, tolerance=0.05)  # other sums round otherwise
    assert 1e-4 < np.abs(scores.probabilities - exact.probabilities).max() < 0.05


def test_a_clip_does_not_depend_on_those_beside_it(model, tokenizer):
    scorer, soft = LabelScorer(model, tokenizer, PROMPT, orders=6), soft_of(4)
    together = scorer.score(SUBTITLES, soft).log_likelihoods
    for clips in ([0], [2], [3, 0], [2, 1]):
        of_these = scorer.score([SUBTITLES[i] for i in clips], soft[jnp.array(clips)]).log_likelihoods
        np.testing.assert_allclose(of_these, together[clips], atol=2e-5)
    assert np.abs(np.diff(together, axis=0)).min() > 1e-3


@pytest.mark.parametrize("orders", [2, 6])
def test_the_order_in_which_labels_are_given_makes_no_difference(model, tokenizer, orders):
    soft, expected = soft_of(2), None
    for labels in (MER2023, MER2023[2:] + MER2023[:2], MER2023[::-1]):
        prompt = PromptConfig(labels=labels)
        scores = LabelScorer(model, tokenizer, prompt, orders=orders).score(SUBTITLES[:2], soft)
        assert scores.labels == labels
        probability = [dict(zip(labels, clip, strict=True)) for clip in scores.probabilities.tolist()]
        expected = expected or probability
        assert probability == expected
    alone = LabelScorer(model, tokenizer, PROMPT).score(SUBTITLES[:2], soft)
    turned = LabelScorer(model, tokenizer, PromptConfig(labels=MER2023[::-1])).score(SUBTITLES[:2], soft)
    assert np.abs(alone.probabilities - turned.probabilities[:, ::-1]).max() > 1e-3


def test_few_programs_compile(model, tokenizer):
    scorer, before = LabelScorer(model, tokenizer, PROMPT), likelihood._nll._cache_size()
    for clips in range(1, 5):
        scorer.score(SUBTITLES[:clips], soft_of(clips))
    assert likelihood._nll._cache_size() - before <= 3  # 1, 2 and 4 rows


def test_no_token_is_read_twice(model, tokenizer):
    """What is read is a set of texts' beginnings: counted by their tokens, soft ones included."""
    scorer, soft = LabelScorer(model, tokenizer, PROMPT, orders=6), soft_of(2)
    answers = [tokenizer.encode(label, specials=False) for label in MER2023]
    for n, read in enumerate(scorer.score(SUBTITLES[:2], soft).tokens):
        beginnings = set()
        for prompt in scorer.prompts(SUBTITLES[n], (True, True, True), IMAGE_TOKENS):
            steps = list(zip(prompt.tokens.tolist(), prompt.soft.tolist(), strict=True))
            for answer in answers:
                text = [*steps, *((token, -1) for token in answer)]
                beginnings |= {tuple(text[: i + 1]) for i in range(len(text))}
        assert read == len(beginnings)


def test_prompts_that_do_not_fit_together_are_divided(model, tokenizer, monkeypatch):
    scorer, soft = LabelScorer(model, tokenizer, PROMPT, orders=6), soft_of(3)
    whole = scorer.score(SUBTITLES[:3], soft)
    monkeypatch.setattr(likelihood, "MAX_TREE", 60)
    divided = scorer.score(SUBTITLES[:3], soft)
    np.testing.assert_allclose(divided.log_likelihoods, whole.log_likelihoods, atol=2e-5)
    assert (divided.tokens > whole.tokens).all()


def test_a_short_prefix_leaves_the_rest_to_the_tree(model, tokenizer):
    scorer, soft = LabelScorer(model, tokenizer, PROMPT, orders=2), soft_of(2)
    whole, short = scorer.score(SUBTITLES[:2], soft), scorer.score(SUBTITLES[:2], soft, length=32)
    np.testing.assert_allclose(short.log_likelihoods, whole.log_likelihoods, atol=2e-5)
    np.testing.assert_array_equal(short.tokens, whole.tokens)


def test_on_a_mesh(tokenizer):
    model, soft = tiny_model(), soft_of(2)
    expected = LabelScorer(model, tokenizer, PROMPT, orders=6).score(SUBTITLES[:2], soft)
    with use_mesh(make_mesh({"data": 2, "fsdp": 1, "tensor": 2}, jax.devices()[:4]), DEFAULT_SHARDING):
        scores = LabelScorer(model, tokenizer, PROMPT, orders=6).score(SUBTITLES[:2], soft)
    np.testing.assert_allclose(scores.log_likelihoods, expected.log_likelihoods, atol=2e-5)


def test_no_clips(model, tokenizer):
    scores = LabelScorer(model, tokenizer, PROMPT, orders=2).score([], soft_of(0))
    assert scores.probabilities.shape == (0, 6) and scores.best == []


@pytest.mark.parametrize(
    ("labels", "orders", "message"),
    [
        (("happy",), 1, "two labels or more"),
        (MER2023, 0, "give 1 to 6"),
        (MER2023, 7, "give 1 to 6"),
    ],
)
def test_labels_that_cannot_be_scored(model, tokenizer, labels, orders, message):
    with pytest.raises(UserError, match=message):
        LabelScorer(model, tokenizer, PromptConfig(labels=labels), orders=orders)


def test_inputs_that_do_not_match(model, tokenizer):
    scorer = LabelScorer(model, tokenizer, PROMPT)
    with pytest.raises(ValueError, match="2 subtitles, the soft tokens of 3 clips and 2 has_feature do not match"):
        scorer.score(SUBTITLES[:2], soft_of(3))
    with pytest.raises(ValueError, match="1 has_feature do not match"):
        scorer.score(SUBTITLES[:2], soft_of(2), [(True, True, True)])
