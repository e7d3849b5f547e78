"""The modalities of a clip, audio (A), video (V) and text (T), and clips without some of them.

Without a modality a clip has no subtitle (T), no HuBERT feature (A), or neither an image nor MAE's and VideoMAE's
features (V): zeros in their places, as for what a clip never had.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from emollama_jax.config import PARTIAL_VIEWS
from emollama_jax.errors import UserError

MODALITIES = {"A": (2,), "V": (0, 1), "T": ()}  # -> those of a clip's features MAE, VideoMAE, HuBERT
ALL = "AVT"
PARTS = PARTIAL_VIEWS
VIEWS = (*PARTS, ALL)


def check_modalities(text: str) -> str:
    """Return the modalities in the order A, V, T. Raises UserError for none, unknown or repeated ones."""
    if not text or set(text) - set(MODALITIES) or len(set(text)) < len(text):
        raise UserError(f"modalities {text!r}: give any of A (audio), V (video) and T (text), as in AV")
    return "".join(modality for modality in MODALITIES if modality in text)


def features_of(modalities: str) -> Bool[np.ndarray, " 3"]:
    """Return which of MAE, VideoMAE and HuBERT belong to the modalities that are named."""
    return np.isin(np.arange(3), [i for modality in modalities for i in MODALITIES[modality]])


def draw_modalities(rng: np.random.Generator, dropout: float, weights: Sequence[float] = ()) -> str:
    """Draw the modalities a clip keeps: with the probability `dropout` one or two of them.

    Args:
        weights: how often each of PARTS is drawn, relative to the others; default: equally often.
    """
    if not dropout or rng.random() >= dropout:
        return ALL
    if not weights:
        return PARTS[rng.integers(len(PARTS))]
    return PARTS[rng.choice(len(PARTS), p=np.asarray(weights) / sum(weights))]
