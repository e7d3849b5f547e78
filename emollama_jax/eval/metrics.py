"""Metrics of classification, all from a confusion matrix that keeps invalid answers apart.

Axes: L labels, P = L + 1 columns (the labels, then invalid answers), R resampled matrices (or none), O label orders.

A row of the matrix is a true label, a column a predicted one. An answer outside the label set stands in the last
column: it lowers the recall of its row, but it is nobody's false positive and no class of its own.

Averages are those of scikit-learn with `zero_division=0` and `labels=` the classes that occur, in the truth or among
the predictions; a class that occurs in neither is left out of macro averages (in weighted ones its weight is 0).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from emollama_jax.errors import UserError

INVALID = ("invalid", "neutral")


def confusion_matrix(
    truth: Sequence[str], predictions: Sequence[str | None], labels: Sequence[str], *, invalid: str = "invalid"
) -> Int[np.ndarray, "L P"]:
    """Counts of (true label, prediction) pairs, int64.

    Args:
        predictions: a label each; anything else is an invalid answer.
        invalid: what becomes of invalid answers: "invalid" (the last column), or "neutral" (counted as that label, as
            the reference's first evaluator did).

    Raises:
        UserError: there are no clips, a true label is outside `labels`, or invalid answers are to be a label that is
            not among them.
        ValueError: the two lists differ in length, or `invalid` is neither of the two.
    """
    if len(truth) != len(predictions):
        raise ValueError(f"{len(truth)} true labels and {len(predictions)} predictions do not match")
    if invalid not in INVALID:
        raise ValueError(f"invalid={invalid!r}: choose one of {', '.join(INVALID)}")
    if not truth:
        raise UserError("no clips to evaluate; give a data set with labels")
    index = {label: i for i, label in enumerate(labels)}
    if invalid == "neutral" and "neutral" not in index:
        raise UserError(f"no label 'neutral' among {', '.join(labels)}; count invalid answers as invalid")
    for i, label in enumerate(truth):
        if label not in index:
            raise UserError(f"clip {i} has the label {label!r}; evaluate with one of {', '.join(labels)}, or add it")
    last = len(labels) if invalid == "invalid" else index["neutral"]
    confusion = np.zeros((len(labels), len(labels) + 1), np.int64)
    np.add.at(confusion, ([index[t] for t in truth], [index.get(p, last) for p in predictions]), 1)
    return confusion


def per_class(confusion: Int[np.ndarray, "*R L P"]) -> dict[str, Float[np.ndarray, "*R L"]]:
    """`precision`, `recall` and `f1` of every label, 0 where undefined, and its `support` (clips that have it)."""
    square = confusion[..., :-1].astype(np.float64)
    hits = np.diagonal(square, axis1=-2, axis2=-1)
    support, predicted = confusion.sum(axis=-1).astype(np.float64), square.sum(axis=-2)
    return {
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, support),
        "f1": _ratio(2 * hits, support + predicted),
        "support": support,
    }


def scores(confusion: Int[np.ndarray, "*R L P"]) -> dict[str, Float[np.ndarray, "*R"]]:
    """Every metric of `text.labels.METRICS`, in 0 to 1.

    `uar`, the unweighted average recall, is over the classes in the truth only; `macro_recall` counts a class that
    only occurs among the predictions as 0. `war`, the weighted average recall, equals the accuracy: both are here
    because tables name them so.
    """
    classes = per_class(confusion)
    support = classes["support"]
    total = support.sum(axis=-1)
    occurs = (support > 0) | (confusion[..., :-1].sum(axis=-2) > 0)
    weighted = {name: _ratio((classes[name] * support).sum(axis=-1), total) for name in ("precision", "recall", "f1")}
    macro = {name: _ratio(classes[name].sum(axis=-1), occurs.sum(axis=-1)) for name in ("precision", "recall", "f1")}
    return {
        "accuracy": _ratio(np.trace(confusion[..., :-1], axis1=-2, axis2=-1), total),
        **{f"weighted_{name}": value for name, value in weighted.items()},
        **{f"macro_{name}": value for name, value in macro.items()},
        "uar": _ratio(classes["recall"].sum(axis=-1), (support > 0).sum(axis=-1)),
        "war": weighted["recall"],
    }


def bootstrap(
    confusion: Int[np.ndarray, "L P"], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """The percentile interval of every metric under resampling of the clips with replacement.

    Drawing clips anew is drawing the cells of their matrix from one multinomial distribution, so all resamples are
    made and scored at once.
    """
    clips = int(confusion.sum())
    drawn = np.random.default_rng(seed).multinomial(clips, confusion.ravel() / clips, size=resamples)
    outside = (1 - level) / 2
    intervals = {}
    for name, values in scores(drawn.reshape(resamples, *confusion.shape)).items():
        low, high = np.quantile(values, [outside, 1 - outside])
        intervals[name] = (float(low), float(high))
    return intervals


def order_sensitivity(
    truth: Sequence[str],
    predictions: Sequence[Sequence[str | None]],
    labels: Sequence[str],
    metric: str,
    *,
    invalid: str = "invalid",
) -> dict[str, float]:
    """How much depends on the order in which the question lists the labels.

    Args:
        predictions: [O][clips], the answers under each order, as a rule all cyclic ones.

    Returns:
        `spread`, the largest minus the smallest value of `metric` over the orders; `changed`, the share of clips that
        do not get the same prediction under all orders (invalid answers count as one and the same).
    """
    matrices = np.stack([confusion_matrix(truth, order, labels, invalid=invalid) for order in predictions])
    values = scores(matrices)[metric]
    known = set(labels)
    answers = [{p if p in known else None for p in of_clip} for of_clip in zip(*predictions, strict=True)]
    return {
        "spread": float(values.max() - values.min()),
        "changed": sum(len(different) > 1 for different in answers) / len(answers),
    }


def _ratio(part: np.ndarray | np.number, whole: np.ndarray | np.number) -> np.ndarray:
    """part / whole, 0 where whole is."""
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=np.asarray(whole) > 0)
