"""Several runs of a system, and two systems on the same clips: mean and deviation, paired bootstrap, McNemar's test.

    spread(evaluations)["weighted_f1"]                       # mean, deviation and values over runs of several seeds
    compare(truth, [a1, a2, a3], [b1, b2, b3], labels, "weighted_f1")
    mcnemar(truth, a1, b1)

Axes: N clips, L labels, P = L + 1 columns, R resampled sets of clips.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import binomtest

from emollama_jax.errors import UserError
from emollama_jax.eval.benchmarks import Evaluation
from emollama_jax.eval.metrics import scores
from emollama_jax.eval.sweep import Prediction

Answers = Sequence[str | None]


@dataclass(frozen=True, slots=True)
class Spread:
    """A score over several runs."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def deviation(self) -> float:
        """The standard deviation of the runs, by n - 1; NaN for a single run."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else float("nan")


@dataclass(frozen=True, slots=True)
class Difference:
    """How much higher a system's score is than another's, on the same clips.

    Attributes:
        difference: of the means over each system's runs.
        interval: its percentile interval under resampling of the clips, of all runs alike.
        p: two-sided: twice the share of resampled differences on the other side of 0, at most 1.
    """

    difference: float
    interval: tuple[float, float]
    p: float


@dataclass(frozen=True, slots=True)
class McNemar:
    """Clips that one system alone gets right, and how surprising these counts are if both are as good.

    Attributes:
        only_first, only_second: clips right by one alone.
        p: of the exact two-sided binomial test; 1 where the systems are right on the same clips.
    """

    only_first: int
    only_second: int
    p: float


def spread(evaluations: Sequence[Evaluation]) -> dict[str, Spread]:
    """Every metric over several runs."""
    return {name: Spread(tuple(one.scores[name] for one in evaluations)) for name in evaluations[0].scores}


def compare(
    truth: Sequence[str],
    first: Sequence[Answers],
    second: Sequence[Answers],
    labels: Sequence[str],
    metric: str,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """Compare two systems on the same clips by a paired bootstrap.

    Args:
        first, second: the predictions of each run of the two systems; anything that is no label is an invalid answer.
        metric: of `text.labels.METRICS`.
    """
    clips = len(truth)
    counts = np.random.default_rng(seed).multinomial(clips, np.full(clips, 1 / clips), size=resamples)
    counts = np.concatenate([np.ones((1, clips), np.int64), counts])  # the clips as they are, first
    means = [
        np.mean([_resampled(truth, run, labels, counts, metric) for run in system], axis=0)
        for system in (first, second)
    ]
    found, drawn = (means[0] - means[1])[0], (means[0] - means[1])[1:]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    p = min(1.0, 2 * float(min((drawn <= 0).mean(), (drawn >= 0).mean())))
    return Difference(float(found), (float(low), float(high)), p)


def mcnemar(truth: Sequence[str], first: Answers, second: Answers) -> McNemar:
    """Test whether two runs are right equally often, by the clips that one of them alone gets right."""
    right = [(one == true, other == true) for true, one, other in zip(truth, first, second, strict=True)]
    only_first, only_second = right.count((True, False)), right.count((False, True))
    both = only_first + only_second
    return McNemar(only_first, only_second, float(binomtest(only_first, both).pvalue) if both else 1.0)


def match_predictions(
    runs: Sequence[Sequence[Prediction]],
) -> tuple[list[str], list[list[str | None]]]:
    """Return the labels of the clips that have one, and each run's predictions of them.

    Raises:
        UserError: the runs are not of the same clips in the same order.
    """
    first = [(one.name, one.emotion) for one in runs[0]]
    if any([(one.name, one.emotion) for one in run] != first for run in runs):
        raise UserError("the runs were not evaluated on the same clips; evaluate them together")
    kept = [i for i, (_, emotion) in enumerate(first) if emotion is not None]
    return [first[i][1] for i in kept], [[run[i].label for i in kept] for run in runs]


def _resampled(
    truth: Sequence[str], predictions: Answers, labels: Sequence[str], counts: np.ndarray, metric: str
) -> Float[np.ndarray, " R"]:
    """The metric of a run on resampled clips, each given by how often every clip counts."""
    index, columns = {label: i for i, label in enumerate(labels)}, len(labels) + 1
    cells = [index[t] * columns + index.get(p, len(labels)) for t, p in zip(truth, predictions, strict=True)]
    one_hot = np.zeros((len(truth), len(labels) * columns))
    one_hot[np.arange(len(truth)), cells] = 1
    matrices = np.rint(counts @ one_hot).astype(np.int64).reshape(len(counts), len(labels), columns)
    return scores(matrices)[metric]
