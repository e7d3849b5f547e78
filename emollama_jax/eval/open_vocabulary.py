"""Metrics of open-vocabulary emotion labels: MER-UniBench, MER2024's and MER2025's tracks, MER2023's ranking.

A clip has a set of labels, any words. Sets are compared by their groups in the five emotion wheels (`eval/wheels.py`).

    overlaps = set_overlaps(truth, predictions, wheels, level=1)     # of each wheel and clip
    set_score(overlaps)                                              # S1

Worked example, for one wheel: clip 1 is {happy, sad} and called {happy, mad, surprised}: P = 1/3, R = 1/2. Clip 2 is
{mad} and called nothing: P = R = 0. Clip 3 is {neutral}, which has no group: left out. Over the clips P = 1/6 and
R = 1/4, so F = 2 (1/6)(1/4) / (1/6 + 1/4) = 1/5: F is taken of the means, not averaged over the clips.

Axes: W wheels, N clips, R resampled sets of clips (or none).
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Shaped

from emollama_jax.errors import UserError
from emollama_jax.eval.metrics import confusion_matrix, scores
from emollama_jax.eval.wheels import WHEELS, EmotionWheels

LabelSets = Sequence[Sequence[str]]

SENTIMENTS = ("positive", "neutral", "negative")
# Groups of the wheels (level 1) by sentiment; surprise, bad and genius tell none or little.
POSITIVE = frozenset({"happy", "joy", "joyful", "peaceful", "powerful", "genius"})
NEUTRAL = frozenset({"surprised"})


def set_overlaps(
    truth: LabelSets, predictions: LabelSets, wheels: EmotionWheels, *, level: int
) -> Float[np.ndarray, "W N 2"]:
    """Precision |G & P| / |P| and recall |G & P| / |G| of each clip's groups in each wheel, 0 where P is empty.

    Clips whose truth has no group in a wheel are NaN there.
    """

    def overlap(wheel: int, true: Sequence[str], predicted: Sequence[str]) -> tuple[float, float]:
        g, p = (wheels.groups(labels, wheel=wheel, level=level) for labels in (true, predicted))
        if not g:
            return (np.nan, np.nan)
        return (len(g & p) / len(p), len(g & p) / len(g)) if p else (0.0, 0.0)

    pairs = list(zip(truth, predictions, strict=True))
    return np.array([[overlap(wheel, *pair) for pair in pairs] for wheel in WHEELS], np.float64).reshape(
        len(WHEELS), -1, 2
    )


def set_score(
    overlaps: Float[np.ndarray, "W N 2"], counts: Shaped[np.ndarray, "*R N"] | None = None
) -> Float[np.ndarray, "*R"]:
    """The mean over the wheels of F = 2 P R / (P + R), of the clips' mean precision P and recall R; 0 where both are 0.

    S1 is that of level 1, S2 of level 2; MER2025 ranks by their mean.

    Args:
        counts: how often each clip counts, for resampling; default: once.

    Raises:
        UserError: no clip has a group in one of the wheels.
    """
    counted = ~np.isnan(overlaps[..., 0])  # [W, N]
    if not counted.any(axis=1).all():
        raise UserError("no clip has a true label that stands in the wheels; check the labels and their language")
    counts = np.ones(overlaps.shape[1]) if counts is None else counts
    totals = np.einsum("...n,wn->...w", counts, counted.astype(np.float64))
    means = np.einsum("...n,wnk->...wk", counts, np.nan_to_num(overlaps)) / np.maximum(totals, 1)[..., None]
    precision, recall = means[..., 0], means[..., 1]
    total = precision + recall
    f = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)
    return np.asarray(f.mean(axis=-1))


def hits(truth: Sequence[str], predictions: LabelSets, wheels: EmotionWheels) -> Float[np.ndarray, "2 W N"]:
    """Hits and M-scores of clips of one label each, at level 1; NaN where the label has no group in a wheel.

    A hit is |G & P|: 1 where the label's group is among those predicted. Long lists hit more, so the M-score divides
    it by the number of predicted groups that are a candidate label's, the labels of all clips; it is 0 without any.
    """

    def hit(wheel: int, true: str, predicted: Sequence[str], candidates: frozenset[str]) -> tuple[float, float]:
        g, p = wheels.groups([true], wheel=wheel), wheels.groups(predicted, wheel=wheel)
        if not g:
            return (np.nan, np.nan)
        return float(len(g & p)), len(g & p) / len(p & candidates) if p & candidates else 0.0

    pairs, found = list(zip(truth, predictions, strict=True)), []
    for wheel in WHEELS:
        candidates = wheels.groups(set(truth), wheel=wheel)
        found.append([hit(wheel, *pair, candidates) for pair in pairs])
    return np.moveaxis(np.array(found, np.float64).reshape(len(WHEELS), -1, 2), -1, 0)


def mean_hits(
    found: Float[np.ndarray, "W N"], counts: Shaped[np.ndarray, "*R N"] | None = None
) -> Float[np.ndarray, "*R"]:
    """The hit rate, or the M-score: the mean over clips, then over wheels.

    Raises:
        UserError: as `set_score`.
    """
    counted = ~np.isnan(found)
    if not counted.any(axis=1).all():
        raise UserError("no clip has a true label that stands in the wheels; check the labels and their language")
    counts = np.ones(found.shape[1]) if counts is None else counts
    totals = np.einsum("...n,wn->...w", counts, counted.astype(np.float64))
    means = np.einsum("...n,wn->...w", counts, np.nan_to_num(found)) / np.maximum(totals, 1)
    return np.asarray(means.mean(axis=-1))


def mean_list_length(predictions: LabelSets) -> float:
    """How many different labels a prediction has on average."""
    return float(np.mean([len({label.lower().strip() for label in labels}) for labels in predictions]))


def sentiment_of(labels: Sequence[str], wheels: EmotionWheels) -> str:
    """Return the sentiment of a set of labels by a vote of their groups: "positive", "neutral" or "negative".

    A label that is itself one of the three counts in place of its groups. Published figures ask a language model.
    """
    votes = 0
    for label in (label.lower().strip() for label in labels):
        if label in SENTIMENTS:
            votes += len(WHEELS) * (1 - SENTIMENTS.index(label))
            continue
        groups = [wheels.group(label, wheel=wheel) for wheel in WHEELS]
        votes += sum((group in POSITIVE) - (group not in POSITIVE | NEUTRAL) for group in groups if group is not None)
    return SENTIMENTS[0 if votes > 0 else 2 if votes < 0 else 1]


def sentiment_scores(truth: Sequence[float], predictions: Sequence[str]) -> dict[str, float]:
    """`weighted_f1` and `accuracy` of (truth > 0) against (prediction is positive), without clips of truth 0.

    Args:
        truth: of each clip, from negative to positive.
        predictions: "positive", "neutral" or "negative"; anything but "positive" is taken for not positive.

    Raises:
        UserError: no clip has a truth other than 0.
    """
    kept = [(t > 0, p == "positive") for t, p in zip(truth, predictions, strict=True) if t != 0]
    if not kept:
        raise UserError("no clip has a sentiment other than 0; give the sentiments as numbers below and above 0")
    names = ("negative", "positive")
    found = scores(confusion_matrix([names[t] for t, _ in kept], [names[p] for _, p in kept], names))
    return {name: float(found[name]) for name in ("weighted_f1", "accuracy")}


def synonym_set_scores(
    truth: LabelSets, predictions: LabelSets, synonyms: Sequence[Sequence[Sequence[str]]]
) -> dict[str, float]:
    """MER2024-OV: the clips' mean set `accuracy` |G & P| / |P| and `recall` |G & P| / |G|, and their `average`.

    Args:
        synonyms: of each clip, groups of labels with like meaning, as a language model sorted those of the truth and of
            the prediction; a label in no group is one by itself.

    Raises:
        UserError: a clip has no true label.
    """
    found = []
    for true, predicted, groups in zip(truth, predictions, synonyms, strict=True):
        name = {label.lower().strip(): group[0].lower().strip() for group in groups for label in group}
        g, p = ({name.get(x, x) for x in (label.lower().strip() for label in some)} for some in (true, predicted))
        if not g:
            raise UserError("a clip has no true label; MER2024-OV's all have")
        found.append((len(g & p) / len(p), len(g & p) / len(g)) if p else (0.0, 0.0))
    accuracy, recall = np.mean(found, axis=0).tolist()
    return {"accuracy": accuracy, "recall": recall, "average": (accuracy + recall) / 2}


def combined_score(weighted_f1: float, valence: Sequence[float], predicted: Sequence[float]) -> float:
    """MER2023's ranking: the labels' weighted F1 minus a quarter of the valences' mean squared error."""
    error = np.subtract(predicted, valence, dtype=np.float64)
    return weighted_f1 - 0.25 * float(np.mean(error**2))


def resample(
    score: Callable[[Shaped[np.ndarray, "R N"]], Float[np.ndarray, " R"]],
    clips: int,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile interval of a score under resampling of the clips with replacement.

    Args:
        score: of sets of clips, each given by how often every clip counts, [R, N].
    """
    drawn = np.random.default_rng(seed).multinomial(clips, np.full(clips, 1 / clips), size=resamples)
    low, high = np.quantile(score(drawn), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def constant_answers(truth: LabelSets) -> Mapping[str, tuple[str, ...]]:
    """Answers that look at no clip, whose scores are the floor of a benchmark: the most frequent label, and all."""
    counts: dict[str, int] = {}
    for label in (label.lower().strip() for labels in truth for label in set(labels)):
        counts[label] = counts.get(label, 0) + 1
    by_count = sorted(counts, key=lambda label: (-counts[label], label))
    return {"most frequent label": tuple(by_count[:1]), "all labels": tuple(by_count)}
