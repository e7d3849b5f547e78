"""Samples into rows of a packed batch.

Axes: B rows, T positions, K clips a row, S soft tokens a clip.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from emollama_jax.text.prompts import Sample


def pack_rows(
    rows: Sequence[Sequence[Sample]], *, length: int, clips_per_row: int, soft_per_clip: int
) -> dict[str, np.ndarray]:
    """Each row's samples one behind the other, each a segment of its own, its clip the row's k-th.

    A soft token s of the k-th clip has the index k S + s among the row's. Example, for S = 5, of the sample
    "<s> (0) ? yes </s>", whose answer is "yes </s>", twice in a row of T = 12:

        tokens        1   0   ?  yes  2 |  1   0   ?  yes  2 |  0   0
        soft_index   -1   0  -1  -1  -1 | -1   5  -1  -1  -1 | -1  -1
        segment_ids   1   1   1   1   1 |  2   2   2   2   2 |  0   0
        positions     0   1   2   3   4 |  0   1   2   3   4 |  0   0
        loss_mask     .   .   T   T   . |  .   .   T   T   . |  .   .

    Returns:
        `tokens`, `soft_index` (-1 at text), `segment_ids` (0 is padding), `positions` int32 and `loss_mask` bool (the
        next token is a target), each [B, T]; `clip_mask` bool [B, K].

    Raises:
        ValueError: a row holds more than `length` tokens or `clips_per_row` samples.
    """
    shape = (len(rows), length)
    columns = {name: np.zeros(shape, np.int32) for name in ("tokens", "soft", "segment_ids", "positions")}
    columns["is_answer"] = np.zeros(shape, bool)
    for b, row in enumerate(rows):
        if len(row) > clips_per_row or sum(len(sample.tokens) for sample in row) > length:
            raise ValueError(f"row {b} holds more than {clips_per_row} clips or {length} tokens")
        start = 0
        for k, sample in enumerate(row):
            here = np.s_[b, start : start + len(sample.tokens)]
            columns["tokens"][here], columns["soft"][here] = sample.tokens, sample.soft
            columns["is_answer"][here] = sample.is_answer
            columns["segment_ids"][here], columns["positions"][here] = k + 1, np.arange(len(sample.tokens))
            start += len(sample.tokens)
    clip_mask = np.arange(clips_per_row) < np.array([len(row) for row in rows])[:, None]
    return place_samples(**columns, soft_per_clip=soft_per_clip) | {"clip_mask": clip_mask}


def place_samples(
    *,
    tokens: Int[np.ndarray, "*B T"],
    soft: Int[np.ndarray, "*B T"],
    is_answer: Bool[np.ndarray, "*B T"],
    segment_ids: Int[np.ndarray, "*B T"],
    positions: Int[np.ndarray, "*B T"],
    soft_per_clip: int,
) -> dict[str, np.ndarray]:
    """What the model reads of rows in which samples stand one behind the other, the k-th sample's clip the row's k-th.

    The arguments are those of `Sample`, and each position's segment (0 is padding) and place in it.
    """
    is_soft = (segment_ids > 0) & (soft >= 0)
    is_last = np.concatenate([segment_ids[..., 1:] != segment_ids[..., :-1], np.ones_like(is_soft[..., :1])], axis=-1)
    return {
        "tokens": tokens,
        "soft_index": np.where(is_soft, soft + (segment_ids - 1) * soft_per_clip, -1).astype(np.int32),
        "segment_ids": segment_ids,
        "positions": positions,
        "loss_mask": np.roll(is_answer, -1, axis=-1) & ~is_last & (segment_ids > 0),
    }
