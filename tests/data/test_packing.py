"""Token placement: the worked example, and that a packed batch gives back what went in."""

import inspect
import re
from fractions import Fraction

import numpy as np
import pytest

from emollama_jax.data.packing import pack_rows
from emollama_jax.text.prompts import Sample

TOKEN_FIELDS = ("tokens", "soft_index", "segment_ids", "positions", "loss_weights")


def sample(length, rng, soft_tokens=5):
    soft = np.full(length, -1, np.int32)
    soft[1 : 1 + soft_tokens] = np.arange(soft_tokens)
    tokens = np.where(soft < 0, rng.integers(3, 600, length), 0).astype(np.int32)
    return Sample(tokens, soft, np.arange(length) >= length - rng.integers(1, 4))


def test_the_example_in_the_docstring():
    ids = {"?": 7, "yes": 8, "no": 9}

    def answered(*answer):
        tokens = np.array([1, 0, 7, *(ids[word] for word in answer), 2], np.int32)
        soft = np.where(np.arange(len(tokens)) == 1, 0, -1).astype(np.int32)
        return Sample(tokens, soft, np.arange(len(tokens)) > 2)

    row, sizes = [answered("yes"), answered("yes", "no")], {"length": 12, "clips_per_row": 2, "soft_per_clip": 5}
    batch, by_token = pack_rows([row], **sizes), pack_rows([row], **sizes, loss_average="token")
    shown = re.findall(r"^ {4}([a-z_]+|by token) +([-\d].*)$", inspect.getdoc(pack_rows), re.MULTILINE)
    arrays = {field: getattr(batch, field) for field in TOKEN_FIELDS} | {"by token": by_token.loss_weights}
    assert [name for name, _ in shown] == list(arrays)
    for name, values in shown:
        expected = [ids[v] if v in ids else float(Fraction(v)) for v in values.replace("|", " ").split()]
        np.testing.assert_array_equal(arrays[name], np.array([expected], arrays[name].dtype), err_msg=name)
    assert batch.clip_mask.tolist() == [[True, True]]
    assert batch.features is batch.clip is batch.frames is batch.image_tokens is None


@pytest.mark.smoke
def test_rows_give_back_what_went_in():
    rng = np.random.default_rng(0)
    rows = [[sample(n, rng) for n in lengths] for lengths in ((9, 12, 7), (30,), (), (8, 22))]
    batch = pack_rows(rows, length=30, clips_per_row=3, soft_per_clip=5)
    arrays = [getattr(batch, name) for name in TOKEN_FIELDS]
    assert [(x.dtype.name, x.shape) for x in arrays] == [("int32", (4, 30))] * 4 + [("float32", (4, 30))]
    assert batch.clip_mask.sum(1).tolist() == [3, 1, 0, 2]
    for b, row in enumerate(rows):
        for k, one in enumerate(row):
            here = batch.segment_ids[b] == k + 1
            assert batch.tokens[b, here].tolist() == one.tokens.tolist()
            soft = batch.soft_index[b, here]
            assert np.where(soft < 0, -1, soft - 5 * k).tolist() == one.soft.tolist()
            assert batch.positions[b, here].tolist() == list(range(len(one.tokens)))
            weights = batch.loss_weights[b, here]
            assert (weights > 0).tolist() == [*one.is_answer[1:], False]
            assert len(set(weights[weights > 0])) == 1 and weights.sum() == pytest.approx(1, abs=1e-6)
    padding = batch.segment_ids == 0
    assert padding.sum(1).tolist() == [2, 0, 30, 0]
    assert not batch.tokens[padding].any() and not batch.loss_weights[padding].any()
    assert (batch.soft_index[padding] == -1).all()


@pytest.mark.parametrize("lengths", [(10, 11), (3, 3, 3)], ids=["tokens", "clips"])
def test_rows_that_are_too_full(lengths):
    rng = np.random.default_rng(0)
    row = [sample(n, rng, soft_tokens=1) for n in lengths]
    with pytest.raises(ValueError, match="row 1 holds more than 2 clips or 20 tokens"):
        pack_rows([[], row], length=20, clips_per_row=2, soft_per_clip=1)
