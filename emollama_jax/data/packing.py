"""Samples into rows of a packed batch.

Axes: B rows, T positions, K clips a row, S soft tokens a clip.
"""

from collections.abc import Sequence

import numpy as np

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
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
    batch["soft_index"] = np.full(shape, -1, np.int32)
    batch["loss_mask"] = np.zeros(shape, bool)
    batch["clip_mask"] = np.arange(clips_per_row) < np.array([len(row) for row in rows])[:, None]
    for b, row in enumerate(rows):
        if len(row) > clips_per_row or sum(len(sample.tokens) for sample in row) > length:
            raise ValueError(f"row {b} holds more than {clips_per_row} clips or {length} tokens")
        start = 0
        for k, sample in enumerate(row):
            here = np.s_[b, start : start + len(sample.tokens)]
            batch["tokens"][here] = sample.tokens
            batch["soft_index"][here] = np.where(sample.soft < 0, -1, sample.soft + k * soft_per_clip)
            batch["segment_ids"][here] = k + 1
            batch["positions"][here] = np.arange(len(sample.tokens))
            batch["loss_mask"][here][:-1] = sample.is_answer[1:]
            start += len(sample.tokens)
    return batch
