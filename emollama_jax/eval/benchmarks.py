"""The benchmarks: their labels, the metrics they are judged by, and the published rows to stand beside.

    evaluation = evaluate(benchmark_of("dfew"), truth, predictions)
    evaluation = evaluate(Benchmark(name="ours", labels=("happy", "sad")), truth, predictions)

Values are fractions of 1 throughout; reports print them in percent. Published rows are those of the Emotion-LLaMA paper
(arXiv:2406.11161), whose tables also hold the baselines.

Axes: L labels, P = L + 1 columns.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from emollama_jax.errors import UserError
from emollama_jax.eval.metrics import bootstrap, confusion_matrix, order_sensitivity, per_class, scores
from emollama_jax.text import labels
from emollama_jax.text.labels import METRICS, check_labels, find_label


class Published(NamedTuple):
    """A row of a published table."""

    who: str
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A data set of clips with one label each."""

    name: str
    """What it is called on the command line."""
    title: str = ""
    """What it is called in a table; default: the name."""
    labels: tuple[str, ...]
    """Its labels, in the order of its question."""
    first_number: int | None = None
    """The number by which its tables mean the first of the labels; None where they hold words alone."""
    metrics: tuple[str, ...] = ("weighted_f1", "accuracy", "macro_f1")
    """Of `METRICS`, those in its tables, the one it is judged by first."""
    published: tuple[Published, ...] = ()
    """What others reached."""

    def __post_init__(self):
        check_labels(self.labels)
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise ValueError(f"no metric {unknown[0]!r}; choose among {', '.join(METRICS)}")

    def label(self, text: str) -> str | None:
        """Return which of the labels a clip's own label is, None where it is none (see `find_label`)."""
        return find_label(text, self.labels, self.first_number)


def _weighted_f1(rows: Mapping[str, float]) -> tuple[Published, ...]:
    return tuple(Published(who, {"weighted_f1": value}) for who, value in rows.items())


def _uar_war(rows: Mapping[str, tuple[float, float]]) -> tuple[Published, ...]:
    return tuple(Published(who, dict(zip(("uar", "war"), values, strict=True))) for who, values in rows.items())


MER2023_PUBLISHED = {
    "Emotion-LLaMA, audio, video and text": 0.9036,
    "Emotion-LLaMA, audio and video": 0.8905,
    "wav2vec 2.0 (audio)": 0.4028,
    "VGGish (audio)": 0.5481,
    "HuBERT (audio)": 0.8511,
    "ResNet (video)": 0.4132,
    "MAE (video)": 0.5547,
    "VideoMAE (video)": 0.6068,
    "RoBERTa (text)": 0.4061,
    "BERT (text)": 0.4360,
    "MacBERT (text)": 0.4632,
}
DFEW_PUBLISHED = {
    "Emotion-LLaMA, zero-shot": (0.4559, 0.5937),
    "Emotion-LLaMA, zero-shot, first frame": (0.4418, 0.5609),
    "Emotion-LLaMA, zero-shot, middle frame": (0.4576, 0.5882),
    "Emotion-LLaMA, zero-shot, peak frame": (0.4712, 0.6062),
    "Emotion-LLaMA, fine-tuned": (0.6421, 0.7706),
    "EC-STFL": (0.4535, 0.5651),
    "Former-DFER": (0.5369, 0.6570),
    "IAL": (0.5571, 0.6924),
    "MAE-DFER": (0.6341, 0.7443),
    "VideoMAE": (0.6360, 0.7460),
}

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="mer2023",
            title="MER2023-SEMI",
            labels=labels.MER2023,
            published=_weighted_f1(MER2023_PUBLISHED),
        ),
        Benchmark(name="mer2024", title="MER2024", labels=labels.MER2023),
        Benchmark(
            name="dfew",
            title="DFEW",
            labels=labels.DFEW,
            first_number=1,
            metrics=("uar", "war"),
            published=_uar_war(DFEW_PUBLISHED),
        ),
    )
}


def benchmark_of(name: str) -> Benchmark:
    """A benchmark by its name.

    Raises:
        UserError: there is none of this name.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    near = difflib.get_close_matches(name, BENCHMARKS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"{name}: no such benchmark; {hint}give one of {', '.join(BENCHMARKS)}, or a list of labels")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result on one benchmark."""

    benchmark: Benchmark
    confusion: Int[np.ndarray, "L P"]
    """Clips by true label and prediction; the last column are invalid answers."""
    invalid: int
    """Answers that are none of the labels."""
    counted_as: str
    """What became of them: "invalid", or "neutral"."""
    scores: dict[str, float]
    """Every metric."""
    intervals: dict[str, tuple[float, float]]
    """Their bootstrap confidence intervals."""
    level: float
    """The intervals' confidence."""
    classes: dict[str, list[float]]
    """Precision, recall, F1 and support of each label."""
    sensitivity: dict[str, float] = field(default_factory=dict)
    """`spread` and `changed` under other orders of the labels (see `order_sensitivity`), where these were asked."""
    valence: dict[str, float | int] = field(default_factory=dict)
    """Of answers with valences: the number of `clips` that have one, their `mse`, and MER2023's `combined` ranking."""

    checkpoint: str = ""
    """How the checkpoint of the model was chosen, where that is known."""

    @property
    def clips(self) -> int:
        return int(self.confusion.sum())

    @property
    def floor(self) -> tuple[str, dict[str, float]]:
        """The label that always given scores best by the benchmark's first metric, and its scores."""
        support = self.confusion.sum(axis=1)
        constant = support[None, :, None] * np.eye(len(support) + 1, dtype=np.int64)[:-1, None, :]
        found = scores(constant)
        best = int(found[self.benchmark.metrics[0]].argmax())
        return self.benchmark.labels[best], {name: float(values[best]) for name, values in found.items()}


def evaluate(
    benchmark: Benchmark,
    truth: Sequence[str],
    predictions: Sequence[str | None],
    *,
    by_order: Sequence[Sequence[str | None]] = (),
    invalid: str = "invalid",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Evaluation:
    """The predictions' metrics, each with its interval.

    Args:
        predictions: a label each, as `parse_label` reads it out of an answer, or None for an invalid one.
        by_order: predictions under several label orders, for the sensitivity of the benchmark's first metric to them.
        invalid: what invalid answers count as (see `confusion_matrix`).

    Raises:
        UserError, ValueError: as in `confusion_matrix`.
    """
    confusion = confusion_matrix(truth, predictions, benchmark.labels, invalid=invalid)
    sensitivity = {}
    if by_order:
        sensitivity = order_sensitivity(truth, by_order, benchmark.labels, benchmark.metrics[0], invalid=invalid)
    return Evaluation(
        benchmark=benchmark,
        confusion=confusion,
        invalid=sum(prediction not in benchmark.labels for prediction in predictions),
        counted_as=invalid,
        scores={name: float(value) for name, value in scores(confusion).items()},
        intervals=bootstrap(confusion, level=level, resamples=resamples, seed=seed),
        level=level,
        classes={name: values.tolist() for name, values in per_class(confusion).items()},
        sensitivity=sensitivity,
    )
