"""What the peer trains on is what we train on."""

import dataclasses

import numpy as np
import pytest

from emollama_jax.bench.train_peer import one_clip_a_row
from emollama_jax.data.packing import pack_rows
from emollama_jax.text.prompts import Sample


@pytest.mark.smoke
def test_packed_rows_come_apart():
    """The rows of `pack_rows`' example, and a second one: "<s> (0) ? yes </s>" twice, "<s> (1) !" and its answer."""
    sample = lambda tokens, soft, answers: Sample(
        np.array(tokens, np.int32), np.array(soft, np.int32), np.arange(len(tokens)) >= len(tokens) - answers
    )
    one = sample([1, 0, 7, 8, 2], [-1, 0, -1, -1, -1], 2)
    other = sample([1, 0, 9, 2], [-1, 1, -1, -1], 1)
    batch = pack_rows([[one, one], [other]], length=12, clips_per_row=3, soft_per_clip=5)
    batch = dataclasses.replace(
        batch,
        features=np.arange(2 * 3 * 3 * 4, dtype=np.float32).reshape(2, 3, 3, 4),
        image_tokens=np.arange(2 * 3 * 2 * 5, dtype=np.float16).reshape(2, 3, 2, 5),
    )
    rows = one_clip_a_row(batch, 5)
    assert rows["tokens"].tolist() == [[1, 0, 7, 8, 2], [1, 0, 7, 8, 2], [1, 0, 9, 2, 0]]
    assert rows["soft_index"].tolist() == [[-1, 0, -1, -1, -1]] * 2 + [[-1, 1, -1, -1, -1]]
    assert rows["loss_weights"].tolist() == [[0, 0, 0.5, 0.5, 0]] * 2 + [[0, 0, 1, 0, 0]]
    assert rows["attention_mask"].tolist() == [[1] * 5, [1] * 5, [1, 1, 1, 1, 0]]
    for name in ("features", "image_tokens"):
        np.testing.assert_array_equal(rows[name], getattr(batch, name)[[0, 0, 1], [0, 1, 0]])
