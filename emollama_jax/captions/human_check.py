"""The sheet on which people score annotations, and what a filled one says: means, and how far the people agree.

Axes: N clips, R raters.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from emollama_jax.captions.annotation import Annotation
from emollama_jax.errors import UserError
from emollama_jax.io.atomic import write_text
from emollama_jax.io.text_encoding import decode_text

RATERS = tuple(f"rater_{i}" for i in range(1, 6))  # as many as rated MERR
CLIPS = 20  # of each label
BEST = 5.0  # scores are from 0
SHEET = "human_check.csv"


@dataclass(frozen=True, slots=True)
class HumanCheck:
    """What people say of annotations."""

    means: dict[str, float]
    """The mean score of each label's clips."""
    clips: int
    """With any score."""
    raters: int
    alpha: float | None
    """Krippendorff's alpha of the scores as intervals: 1 is full agreement, 0 what chance gives; None where no clip has
    two scores, or all scores are equal."""


def write_sheet(out: Path, annotated: Sequence[Annotation], seed: int = 0) -> HumanCheck | None:
    """Writes the sheet of CLIPS clips of each label, unless one with any score in it is there, which stays.

    Returns:
        What the filled sheet says, None where it is new.

    Raises:
        UserError: the sheet that is there cannot be read.
    """
    path = out / SHEET
    if path.exists() and (found := read_sheet(path)) is not None:
        return found
    rng = np.random.default_rng(seed)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("name", "emotion", "caption", *RATERS))
    for label in sorted({one.label for one in annotated}):
        own = [one for one in annotated if one.label == label]
        for place in sorted(rng.permutation(len(own))[:CLIPS]):
            caption = own[place].caption_fine or own[place].caption_coarse
            rows.writerow((own[place].name, label, caption, *("" for _ in RATERS)))
    write_text(path, text.getvalue())
    return None


def read_sheet(path: Path) -> HumanCheck | None:
    """Reads a sheet; None where it has no score. All columns whose name begins with "rater" are scores.

    Raises:
        UserError: it is no sheet, or a score is not a number from 0 to BEST.
    """
    rows = list(csv.DictReader(io.StringIO(decode_text(path.read_bytes()))))
    raters = [name for name in (rows[0] if rows else ()) if name and name.startswith("rater")]
    if rows and not (raters and "emotion" in rows[0]):
        raise UserError(f"{path} has no columns emotion and rater_1, ...; remove it, and it is written anew")
    scores = np.full((len(rows), len(raters)), math.nan)
    for i, row in enumerate(rows):
        for k, rater in enumerate(raters):
            if cell := (row[rater] or "").strip().replace(",", "."):
                try:
                    scores[i, k] = float(cell)
                except ValueError:
                    scores[i, k] = math.inf
                if not 0 <= scores[i, k] <= BEST:
                    raise UserError(
                        f"{path}, clip {i + 1}: {cell!r} by {rater} is no score from 0 to {BEST:g}; mend it"
                    )
    given = ~np.isnan(scores)
    if not given.any():
        return None
    labels = np.array([row["emotion"] for row in rows])
    means = {
        str(label): round(float(np.nanmean(scores[labels == label])), 3)
        for label in sorted({*labels[given.any(axis=1)]})
    }
    return HumanCheck(means, int(given.any(axis=1).sum()), int(given.any(axis=0).sum()), krippendorff_alpha(scores))


def krippendorff_alpha(scores: Float[np.ndarray, "N R"]) -> float | None:
    """Computes Krippendorff's alpha of scores as intervals, NaN where a rater gave none.

    One less the ratio of the mean squared difference of two scores of a clip to that of any two scores, over clips that
    have two scores or more. None where that cannot be computed.
    """
    units = [row[~np.isnan(row)] for row in scores]
    units = [row for row in units if len(row) > 1]
    if not units:
        return None
    values = np.concatenate(units)
    pairs = lambda row: float(np.square(row[:, None] - row).sum())
    observed = sum(pairs(row) / (len(row) - 1) for row in units) / len(values)
    expected = pairs(values) / (len(values) * (len(values) - 1))
    return None if expected == 0 else 1 - observed / expected
