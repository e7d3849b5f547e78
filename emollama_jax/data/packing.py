"""Token placement: samples in the rows of a packed batch, and the weights of their targets in the loss. Pure NumPy.

Axes: B rows, T positions, K clips a row, S soft tokens a clip.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int

from emollama_jax.data.batch import Batch
from emollama_jax.text.prompts import Sample


def pack_rows(
    rows: Sequence[Sequence[Sample]],
    *,
    length: int,
    clips_per_row: int,
    soft_per_clip: int,
    loss_average: str = "clip",
) -> Batch:
    """Pack each row's samples one after another, each a segment of its own, its clip the row's k-th.

    Soft token s of the k-th clip has the index k S + s among the row's. Example, for S = 5, in a row of T = 12: the
    sample "<s> (0) ? yes </s>", whose answer "yes </s>" has two targets, then "<s> (0) ? yes no </s>" with three. A
    position weighs as the target after it does; each clip's targets share the weight 1, and with loss_average="token"
    each of them has it:

        tokens        1   0   ?  yes  2 |  1   0   ?  yes  no  2 |  0
        soft_index   -1   0  -1  -1  -1 | -1   5  -1  -1  -1  -1 | -1
        segment_ids   1   1   1   1   1 |  2   2   2   2   2   2 |  0
        positions     0   1   2   3   4 |  0   1   2   3   4   5 |  0
        loss_weights  0   0  1/2 1/2  0 |  0   0  1/3 1/3 1/3  0 |  0
        by token      0   0   1   1   0 |  0   0   1   1   1   0 |  0

    Returns:
        The batch's arrays [B, T] and `clip_mask`; the other arrays of clips are None.

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
    batch = place_samples(**columns, soft_per_clip=soft_per_clip, loss_average=loss_average)
    return dataclasses.replace(batch, clip_mask=clip_mask)


def place_samples(
    *,
    tokens: Int[np.ndarray, "B T"],
    soft: Int[np.ndarray, "B T"],
    is_answer: Bool[np.ndarray, "B T"],
    segment_ids: Int[np.ndarray, "B T"],
    positions: Int[np.ndarray, "B T"],
    soft_per_clip: int,
    loss_average: str,
) -> Batch:
    """Make the batch of rows in which samples stand one after another, the k-th sample's clip the row's k-th.

    The arguments are those of `Sample`, and each position's segment (0 is padding) and place in it.
    """
    is_soft = (segment_ids > 0) & (soft >= 0)
    is_last = np.concatenate([segment_ids[:, 1:] != segment_ids[:, :-1], np.ones_like(is_soft[:, :1])], axis=1)
    before_target = np.roll(is_answer, -1, axis=1) & ~is_last & (segment_ids > 0)
    return Batch(
        tokens=tokens,
        soft_index=np.where(is_soft, soft + (segment_ids - 1) * soft_per_clip, -1).astype(np.int32),
        segment_ids=segment_ids,
        positions=positions,
        loss_weights=_loss_weights(before_target, segment_ids, loss_average),
    )


def _loss_weights(
    before_target: Bool[np.ndarray, "B T"], segment_ids: Int[np.ndarray, "B T"], average: str
) -> Float32[np.ndarray, "B T"]:
    """Weigh the positions before targets: 1 each by "token", 1 shared by those of a segment by "clip"."""
    if average == "token":
        return before_target.astype(np.float32)
    segments = np.arange(len(segment_ids))[:, None] * (segment_ids.max(initial=0) + 1) + segment_ids
    counts = np.bincount(segments.ravel(), weights=before_target.ravel())[segments]
    return np.where(before_target, 1 / np.maximum(counts, 1), 0).astype(np.float32)
