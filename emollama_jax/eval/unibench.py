"""MER-UniBench and the open-vocabulary tracks: which data sets there are, how each is scored, and what others reached.

    evaluation = evaluate_open(OPEN_SETS["ov-merd"], truth, predictions, wheels)
    means = unibench_mean({"mer2023": evaluation, ...})

Published rows are those of AffectGPT's paper (arXiv:2501.16566) and, where marked second-hand, of papers that cite it;
the rows by modality are of Emotion-LLaMA's released checkpoint. Scores are fractions of 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from emollama_jax.data.modalities import VIEWS
from emollama_jax.errors import UserError
from emollama_jax.eval.benchmarks import Published
from emollama_jax.eval.open_vocabulary import (
    constant_answers,
    hits,
    mean_hits,
    mean_list_length,
    resample,
    sentiment_of,
    sentiment_scores,
    set_overlaps,
    set_score,
)
from emollama_jax.eval.wheels import EmotionWheels

KINDS = ("set", "hit", "sentiment")
HEADINGS = {
    "s1": "S1",
    "s2": "S2",
    "s_mean": "mean of S1 and S2",
    "hit_rate": "hit rate",
    "m_score": "M-score",
    "list_length": "labels a clip",
    "weighted_f1": "weighted F1",
    "accuracy": "accuracy",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSet:
    """A data set whose clips are given labels of an open vocabulary."""

    name: str
    """What it is called on the command line and in the names of files."""
    title: str
    """What it is called in a table."""
    kind: str
    """How it is scored: set (of several true labels), hit (of one) or sentiment (a number)."""
    clips: int | None = None
    """How many clips it has; None where that is not known."""
    published: tuple[Published, ...] = ()
    """What others reached."""

    @property
    def first_metric(self) -> str:
        """The metric that stands for the set in MER-UniBench."""
        return {"set": "s1", "hit": "hit_rate", "sentiment": "weighted_f1"}[self.kind]


def _by_view(values: Sequence[float]) -> tuple[Published, ...]:
    rows = zip(VIEWS, values, strict=True)
    return tuple(Published(f"Emotion-LLaMA, released, {view}", {"s1": value / 100}) for view, value in rows)


UNIBENCH = (
    OpenSet(name="mer2023", title="MER2023", kind="hit", clips=411),
    OpenSet(name="mer2024", title="MER2024", kind="hit", clips=1169),
    OpenSet(name="meld", title="MELD", kind="hit", clips=2610),
    OpenSet(name="iemocap", title="IEMOCAP", kind="hit", clips=1241),
    OpenSet(name="mosi", title="CMU-MOSI", kind="sentiment"),
    OpenSet(name="mosei", title="CMU-MOSEI", kind="sentiment"),
    OpenSet(name="sims", title="SIMS", kind="sentiment"),
    OpenSet(name="simsv2", title="SIMS v2", kind="sentiment"),
    OpenSet(
        name="ov-merd",
        title="OV-MERD+",
        kind="set",
        clips=532,
        published=_by_view((29.104, 29.464, 38.215, 48.257, 42.108, 44.961, 54.439)),
    ),
)
OPEN_SETS = {
    one.name: one
    for one in (
        UNIBENCH[-1],
        OpenSet(
            name="mer-fg",
            title="MER-FG 2025",
            kind="set",
            clips=1200,
            published=_by_view((17.533, 20.976, 26.024, 31.410, 28.699, 29.471, 36.889)),
        ),
        OpenSet(name="open", title="Open vocabulary", kind="set"),
    )
}
UNIBENCH_MEANS = {
    "PandaGPT": 0.5292,
    "Emotion-LLaMA": 0.6417,
    "AffectGPT": 0.7477,
    "AffectGPT, audio and text": 0.7218,
    "AffectGPT, video and text": 0.7431,
    "SALMONN": 0.5789,
    "Qwen-Audio": 0.4926,
    "mPLUG-Owl": 0.6245,
    "Chat-UniVi": 0.5794,
    "R1-Omni (second-hand)": 0.5961,
    "AffectGPT-R1 (second-hand)": 0.7948,
    "Emotion-LLaMA v2 (second-hand)": 0.7891,
}


@dataclass(frozen=True, slots=True)
class OpenEvaluation:
    """The scores of a system's labels on one set.

    Attributes:
        scores: of `HEADINGS`, those of the set's kind.
        intervals: the bootstrap interval of each score but the list's length.
        floors: the scores of answers that look at no clip (`constant_answers`).
        clips: how many have a true label, and of these `scored` count in at least one wheel, or have a sentiment.
        unanswered: clips without a label in the predictions' file, which count as an empty list.
    """

    open_set: OpenSet
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    level: float
    floors: dict[str, dict[str, float]]
    clips: int
    scored: int
    unanswered: tuple[str, ...] = ()
    others: tuple[str, ...] = field(default=())

    @property
    def count_note(self) -> str:
        """What is to be said of another number of clips than the benchmark's; "" where they agree."""
        if self.open_set.clips in (None, self.clips):
            return ""
        return f"{self.open_set.title} has {self.open_set.clips} clips, these are {self.clips}: not its figures"


def evaluate_open(
    open_set: OpenSet,
    truth: Mapping[str, Sequence[str] | float],
    predictions: Mapping[str, Sequence[str]],
    wheels: EmotionWheels,
    *,
    level: float = 0.95,
    resamples: int = 2000,
) -> OpenEvaluation:
    """Score the labels of clips.

    Args:
        truth: by clip: its labels, or the number that says its sentiment. Clips without labels do not count.
        predictions: the labels of clips by the same names; other clips do not count.

    Raises:
        UserError: no prediction is about a clip of `truth`, no true label is in the wheels, or a clip of a set of kind
            "hit" has several labels.
    """
    names = [name for name, true in truth.items() if not isinstance(true, Sequence) or len(true)]
    if not predictions.keys() & set(names):
        raise UserError("no prediction is about a clip with a label; check that both files name the clips alike")
    given = [tuple(predictions.get(name, ())) for name in names]
    true = [truth[name] for name in names]
    score = _SCORERS[open_set.kind](true, wheels)
    found, resampled, scored = score(given)
    if open_set.kind == "sentiment":
        constants = {f"always {sentiment}": (sentiment,) for sentiment in ("positive", "negative")}
    else:
        constants = constant_answers(true)
    floors = {who: score([labels] * len(names))[0] for who, labels in constants.items()}
    intervals = {
        name: resample(function, len(names), level=level, resamples=resamples) for name, function in resampled.items()
    }
    return OpenEvaluation(
        open_set=open_set,
        scores=found,
        intervals=intervals,
        level=level,
        floors=floors,
        clips=len(names),
        scored=scored,
        unanswered=tuple(name for name in names if name not in predictions),
        others=tuple(name for name in predictions if name not in truth),
    )


Score = tuple[dict[str, float], dict[str, Callable[[np.ndarray], np.ndarray]], int]


def _score_sets(truth: Sequence[Sequence[str]], wheels: EmotionWheels) -> Callable[[Sequence[Sequence[str]]], Score]:
    def score(predictions: Sequence[Sequence[str]]) -> Score:
        overlaps = [set_overlaps(truth, predictions, wheels, level=level) for level in (1, 2)]
        functions = {
            "s1": lambda counts: set_score(overlaps[0], counts),
            "s2": lambda counts: set_score(overlaps[1], counts),
            "s_mean": lambda counts: (set_score(overlaps[0], counts) + set_score(overlaps[1], counts)) / 2,
        }
        scored = int((~np.isnan(overlaps[0][..., 0])).any(axis=0).sum())
        return _of_all(functions, predictions) | _length(predictions), functions, scored

    return score


def _score_hits(truth: Sequence[Sequence[str]], wheels: EmotionWheels) -> Callable[[Sequence[Sequence[str]]], Score]:
    if several := [labels for labels in truth if len(labels) > 1]:
        raise UserError(
            f"a clip has the labels {', '.join(several[0])}: a hit rate is of one label; score sets instead"
        )

    def score(predictions: Sequence[Sequence[str]]) -> Score:
        hit, m_score = hits([labels[0] for labels in truth], predictions, wheels)
        functions = {
            "hit_rate": lambda counts: mean_hits(hit, counts),
            "m_score": lambda counts: mean_hits(m_score, counts),
        }
        scored = int((~np.isnan(hit)).any(axis=0).sum())
        return _of_all(functions, predictions) | _length(predictions), functions, scored

    return score


def _score_sentiments(truth: Sequence[float], wheels: EmotionWheels) -> Callable[[Sequence[Sequence[str]]], Score]:
    def score(predictions: Sequence[Sequence[str]]) -> Score:
        said = [sentiment_of(labels, wheels) for labels in predictions]
        functions = {"weighted_f1": lambda counts: _weighted_f1(truth, said, counts)}
        return sentiment_scores(truth, said) | _length(predictions), functions, sum(value != 0 for value in truth)

    return score


def _weighted_f1(truth: Sequence[float], said: Sequence[str], counts: np.ndarray) -> np.ndarray:
    """The weighted F1 of resampled clips, [R]."""
    t, p, kept = np.array(truth) > 0, np.array(said) == "positive", np.array(truth) != 0
    cells = [[counts @ (kept & (t == row) & (p == column)) for column in (False, True)] for row in (False, True)]
    total, found = np.maximum(sum(map(sum, cells)), 1), 0.0
    for one in (0, 1):
        support = cells[one][0] + cells[one][1]
        denominator = support + cells[0][one] + cells[1][one]
        found = found + support / total * 2 * cells[one][one] / np.maximum(denominator, 1)
    return found


def _of_all(functions: Mapping[str, Callable], predictions: Sequence) -> dict[str, float]:
    counts = np.ones(len(predictions))
    return {name: float(function(counts)) for name, function in functions.items()}


def _length(predictions: Sequence[Sequence[str]]) -> dict[str, float]:
    return {"list_length": mean_list_length(predictions)}


_SCORERS = {"set": _score_sets, "hit": _score_hits, "sentiment": _score_sentiments}


def unibench_mean(evaluations: Mapping[str, OpenEvaluation]) -> float | None:
    """The mean over the nine sets, each by its first metric; None where one of them is missing."""
    if any(one.name not in evaluations for one in UNIBENCH):
        return None
    return float(np.mean([evaluations[one.name].scores[one.first_metric] for one in UNIBENCH]))
