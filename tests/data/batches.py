"""What the tests of the pipeline read out of its batches."""

from pathlib import Path

import jax
import numpy as np

from emollama_jax.data.batch import Batch
from tests.data.prepared import tiny_config

TRAIN, VAL = 37, 10


def config_of(folder: Path, **data):
    return tiny_config({"train": (f"{folder}:train",), "eval": (f"{folder}:val",), **data})


def batches(dataset) -> list[Batch]:
    iterator = iter(dataset)
    found = list(iterator)
    iterator.close()
    return found


def clips_of(batches) -> list[int]:
    return [int(clip) for batch in batches for clip in batch.clip[batch.clip_mask]]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def samples_of(batch) -> dict[tuple[int, int], tuple]:
    """(row, clip's place) -> (clip's number, ids, soft tokens, which are answers), taken back out of a packed batch."""
    found = {}
    for row in range(len(batch.tokens)):
        for k in np.flatnonzero(batch.clip_mask[row]):
            here = np.flatnonzero(batch.segment_ids[row] == k + 1)
            soft = batch.soft_index[row, here]
            is_answer = np.concatenate([[False], batch.loss_weights[row, here][:-1] > 0])
            assert not batch.loss_weights[row, here[-1]]
            assert batch.positions[row, here].tolist() == list(range(len(here)))
            found[row, int(k)] = (
                int(batch.clip[row, k]),
                batch.tokens[row, here].tolist(),
                [int(s) - int(k) * 8 if s >= 0 else -1 for s in soft],
                is_answer.tolist(),
            )
    return found
