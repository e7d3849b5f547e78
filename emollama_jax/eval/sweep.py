"""Evaluation of a model on a benchmark: the clips of a split, by modalities and by frame rules.

    evaluated = evaluate_records(engine, records, benchmark_of("mer2023"), modalities="AV")
    cells = sweep(engine, [first, middle], benchmark, modalities=["AVT", "A"])
    save_sweep(cells, Path("results"))

Clips without a label are left out.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emollama_jax.data.modalities import ALL, check_modalities
from emollama_jax.data.records import Records
from emollama_jax.errors import UserError
from emollama_jax.eval.benchmarks import Benchmark, Evaluation, Published, evaluate
from emollama_jax.eval.report import HEADINGS, OURS, save, table, to_dict
from emollama_jax.infer.answer import ClipAnswer, ClipError
from emollama_jax.infer.engine import Engine
from emollama_jax.infer.score import label_orders as spread_orders
from emollama_jax.io.atomic import write_json, write_text
from emollama_jax.io.json_lines import write_json_lines
from emollama_jax.io.paths import PathLike, as_path
from emollama_jax.text.answers import parse_label
from emollama_jax.text.prompts import emotion_question, request

WAYS = ("score", "generate")
PREDICTIONS = "predictions.jsonl"
DIGITS = 6  # of a probability
LABEL_ORDERS = ("given", "sorted", "reversed")  # of the labels in a question: the benchmark's, or made from it

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Prediction:
    """What a system says about a clip, and the clip's own label.

    Attributes:
        emotion: the clip's own label; None where it has none.
        answer: a label, or the generated text.
        label: the label that the answer ends with; None for an invalid answer.
        probabilities: of each label, where labels were scored.
    """

    name: str
    emotion: str | None
    answer: str
    label: str | None
    probabilities: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Evaluated:
    """An evaluation and its predictions, with those about clips without a label.

    Attributes:
        tokens, seconds: that the model read to score labels, without padding, and took, with what compiles; of views
            that are scored together each has its share.
    """

    evaluation: Evaluation
    predictions: tuple[Prediction, ...]
    tokens: float = 0.0
    seconds: float = 0.0

    @property
    def unlabelled(self) -> int:
        return sum(prediction.emotion is None for prediction in self.predictions)

    def save(self, folder: PathLike) -> None:
        """Writes what `report.save` does, and the predictions."""
        save(self.evaluation, folder)
        write_json_lines(as_path(folder) / PREDICTIONS, map(dataclasses.asdict, self.predictions))


def evaluate_records(
    engine: Engine,
    records: Records,
    benchmark: Benchmark,
    *,
    modalities: str = ALL,
    orders: int = 1,
    by: str = "score",
    batch_size: int = 16,
    invalid: str = "invalid",
    progress: Progress = lambda count: None,
) -> Evaluated:
    """Evaluate a model's labels for the clips of a split.

    Args:
        engine: the labels of its prompt give way to the benchmark's.
        orders: of the labels in the question; with more than one the evaluation says how much depends on them.
        by: "score" takes the most likely label, "generate" the one that the generated answer ends with (of several
            orders, the one given most often).
        invalid: see `confusion_matrix`.
        progress: is told how many more clips are done; with `generate` they are gone through once for each order.

    Raises:
        UserError: no clip has a label, one has a label outside the benchmark's, or a clip has no answer.
    """
    if by not in WAYS:
        raise UserError(f"by {by!r}: give one of {', '.join(WAYS)}")
    check_labels(records, benchmark)
    prompt = dataclasses.replace(engine.config.prompt, labels=benchmark.labels)
    engine = engine.replace(prompt=prompt, modalities=modalities, orders=orders)
    answers = lambda *questions: list(_answers(engine, records, questions, batch_size, progress))
    emotions = _emotions(records, benchmark)
    if by == "score":
        return _evaluate_scored(benchmark, emotions, answers(), orders, invalid)
    asked = (emotion_question(order, prompt.emotion_question) for order in spread_orders(benchmark.labels, orders))
    texts = [answers(request("emotion", question)) for question in asked]
    by_order = [[parse_label(one.answer, benchmark.labels) for one in of_order] for of_order in texts]
    predictions = [
        _majority(*of_clip)
        for of_clip in zip(emotions, zip(*texts, strict=True), zip(*by_order, strict=True), strict=True)
    ]
    return _evaluate(benchmark, emotions, predictions, by_order, invalid)


def evaluate_views(
    engine: Engine,
    records: Records,
    benchmark: Benchmark,
    views: Sequence[str],
    *,
    orders: int = 1,
    batch_size: int = 16,
    invalid: str = "invalid",
    progress: Progress = lambda count: None,
) -> dict[str, Evaluated]:
    """Evaluate a model's likeliest labels under several sets of modalities, which share most of the work.

    The arguments are those of `evaluate_records`; `progress` is told of a clip once for each view.

    Raises:
        UserError: as `evaluate_records`.
    """
    views = [check_modalities(view) for view in views]
    check_labels(records, benchmark)
    prompt = dataclasses.replace(engine.config.prompt, labels=benchmark.labels)
    engine = engine.replace(prompt=prompt, modalities=ALL, orders=orders)
    emotions, answers = _emotions(records, benchmark), []
    clips = (records[i] for i in range(len(records)))
    for found in engine.label_views(clips, views, batch_size=batch_size):
        if isinstance(found, ClipError):
            raise found
        answers.append(found)
        progress(len(views))
    return {
        view: _evaluate_scored(benchmark, emotions, [found[view] for found in answers], orders, invalid)
        for view in views
    }


def _emotions(records: Records, benchmark: Benchmark) -> list[str | None]:
    """The clips' own labels, as the benchmark writes them."""
    labels = [benchmark.label(label) for label in records.metadata["labels"]]
    return [labels[index] if index >= 0 else None for index in records.metadata["answers"][records.split]["emotion"]]


def _evaluate_scored(
    benchmark: Benchmark, emotions: Sequence[str | None], found: Sequence[ClipAnswer], orders: int, invalid: str
) -> Evaluated:
    by_order = [list(labels) for labels in zip(*(answer.label_by_order for answer in found), strict=True)]
    predictions = [_scored(*pair, benchmark.labels) for pair in zip(found, emotions, strict=True)]
    evaluated = _evaluate(benchmark, emotions, predictions, by_order if orders > 1 else [], invalid)
    seconds = sum(answer.timings_s.get(kind, 0.0) for answer in found for kind in ("encode", "label"))
    tokens = sum(answer.label_tokens for answer in found)
    return dataclasses.replace(evaluated, tokens=float(tokens), seconds=float(seconds))


def _evaluate(
    benchmark: Benchmark,
    emotions: Sequence[str | None],
    predictions: Sequence[Prediction],
    by_order: Sequence[Sequence[str | None]],
    invalid: str,
) -> Evaluated:
    labelled = [i for i, emotion in enumerate(emotions) if emotion is not None]
    evaluation = evaluate(
        benchmark,
        [emotions[i] for i in labelled],
        [predictions[i].label for i in labelled],
        by_order=[[of_order[i] for i in labelled] for of_order in by_order] if len(by_order) > 1 else (),
        invalid=invalid,
    )
    return Evaluated(evaluation, tuple(predictions))


def check_labels(records: Records, benchmark: Benchmark) -> None:
    """Raises UserError, before any work, where the clips have no labels or others than the benchmark's."""
    where, answers = f"{records.path}:{records.split}", records.metadata["answers"][records.split]
    found = {records.metadata["labels"][index] for index in answers["emotion"] if index >= 0}
    if not found:
        raise UserError(f"no clip has a label: {where}; give data that has them")
    if unknown := sorted(label for label in found if benchmark.label(label) is None):
        raise UserError(
            f"{where} has clips with the label {unknown[0]!r}, {benchmark.title or benchmark.name} has "
            f"{', '.join(benchmark.labels)}; give that benchmark's data, or evaluate by the data's own labels"
        )


def _answers(
    engine: Engine, records: Records, questions: Sequence[str], batch_size: int, progress: Progress
) -> Iterator[ClipAnswer]:
    """Yield the answers about all clips of a split. Raises UserError for a clip without one."""
    clips = (records[i] for i in range(len(records)))
    for result in engine.answer(clips, questions, batch_size=batch_size):
        if isinstance(result, ClipError):
            raise result
        progress(1)
        yield result


def _scored(answer: ClipAnswer, emotion: str | None, labels: Sequence[str]) -> Prediction:
    probabilities = {label: round(answer.probabilities[label], DIGITS) for label in labels}
    return Prediction(answer.name, emotion, answer.answer, answer.label, probabilities)


def _majority(emotion: str | None, answers: Sequence[ClipAnswer], labels: Sequence[str | None]) -> Prediction:
    """Return the label that most of a clip's answers end with, and the first of these answers."""
    counts = Counter(label for label in labels if label is not None)
    label = counts.most_common(1)[0][0] if counts else None
    text = next(answer.answer for answer, found in zip(answers, labels, strict=True) if found == label)
    return Prediction(answers[0].name, emotion, text, label)


@dataclass(frozen=True)
class Cell:
    """One evaluation of a sweep: of one data set, under one set of modalities and one order of labels."""

    data: str
    frame: str
    modalities: str
    evaluated: Evaluated
    label_order: str = LABEL_ORDERS[0]

    @property
    def name(self) -> str:
        """Of the folder."""
        return "-".join([self.frame, self.modalities, *([self.label_order] * (self.label_order != LABEL_ORDERS[0]))])

    @property
    def title(self) -> str:
        """Of the row in a table."""
        order = f", labels {self.label_order}" if self.label_order != LABEL_ORDERS[0] else ""
        return f"{self.modalities}, {self.frame} frame{order}"

    def with_checkpoint(self, how: str) -> "Cell":
        """Return the same, with what is to be said of the model's checkpoint."""
        evaluation = dataclasses.replace(self.evaluated.evaluation, checkpoint=how)
        return dataclasses.replace(self, evaluated=dataclasses.replace(self.evaluated, evaluation=evaluation))


def sweep(
    engine: Engine,
    splits: Sequence[Records],
    benchmark: Benchmark,
    *,
    modalities: Sequence[str] = (ALL,),
    label_orders: Sequence[str] = LABEL_ORDERS[:1],
    **settings: Any,
) -> list[Cell]:
    """Evaluate each split, as a rule the same clips prepared by several frame rules, under each set of modalities.

    Where labels are scored, the sets of modalities share their work (`evaluate_views`).

    Args:
        label_orders: of LABEL_ORDERS, those in which the question lists the labels, each a row of its own.
        settings: of `evaluate_records`.

    Raises:
        UserError: two splits have the same frame rule, or as `evaluate_records`.
    """
    frames = [str(records.metadata["recipe"]["frame_rule"]) for records in splits]
    if len(set(frames)) < len(frames):
        raise UserError(f"data of the frame rules {', '.join(frames)}: give each rule once, or evaluate one by one")
    cells = []
    for (records, frame), label_order in itertools.product(zip(splits, frames, strict=True), label_orders):
        ordered = dataclasses.replace(benchmark, labels=_ordered(benchmark.labels, label_order))
        if len(modalities) > 1 and settings.get("by", WAYS[0]) == "score":
            options = {name: value for name, value in settings.items() if name != "by"}
            found = evaluate_views(engine, records, ordered, modalities, **options)
        else:
            found = {
                some: evaluate_records(engine, records, ordered, modalities=some, **settings) for some in modalities
            }
        where = f"{records.path}:{records.split}"
        cells += [Cell(where, frame, some, one, label_order) for some, one in found.items()]
    return cells


def _ordered(labels: tuple[str, ...], label_order: str) -> tuple[str, ...]:
    if label_order not in LABEL_ORDERS:
        raise UserError(f"label order {label_order!r}: give one of {', '.join(LABEL_ORDERS)}")
    return {"given": labels, "sorted": tuple(sorted(labels)), "reversed": labels[::-1]}[label_order]


def save_sweep(cells: Sequence[Cell], folder: PathLike) -> None:
    """Write one evaluation into the folder, several into folders in it, with `sweep.json` and `sweep.md` over all."""
    folder = as_path(folder)
    if len(cells) == 1:
        cells[0].evaluated.save(folder)
        return
    for cell in cells:
        cell.evaluated.save(folder / cell.name)
    rows = []
    for cell in cells:
        row = {name: getattr(cell, name) for name in ("data", "frame", "modalities", "label_order")}
        row |= {"tokens": round(cell.evaluated.tokens), "seconds": round(cell.evaluated.seconds, 3)}
        rows.append(row | to_dict(cell.evaluated.evaluation))
    write_json(folder / "sweep.json", rows)
    write_text(folder / "sweep.md", sweep_markdown(cells))


def sweep_markdown(cells: Sequence[Cell]) -> str:
    """A row for each evaluation, above the published ones; in percent."""
    first = cells[0].evaluated.evaluation
    benchmark, metrics = first.benchmark, list(first.benchmark.metrics)
    headings = [HEADINGS[name] for name in metrics]
    if first.sensitivity:
        metrics.append("spread")
        headings.append(f"{headings[0]} spread by label order")
    body = []
    for cell in cells:
        evaluation = cell.evaluated.evaluation
        spread = [_percent(evaluation.sensitivity["spread"])] if first.sensitivity else []
        shown = [with_interval(evaluation, name) for name in benchmark.metrics]
        body.append([f"**{OURS}**, {cell.title}", *shown, *spread])
    label, floor = first.floor
    for row in (Published(f"floor: always {label}", floor), *benchmark.published):
        body.append([row.who, *(_percent(row.scores[name]) if name in row.scores else "" for name in metrics)])
    title = f"# {benchmark.title or benchmark.name}"
    counts = f"{first.clips} clips; percent, with {100 * first.level:g} % intervals."
    chosen = [f"Checkpoint: {first.checkpoint}."] if first.checkpoint else []
    return "\n".join([title, "", counts, *chosen, "", *table(["", *headings], body)]) + "\n"


def with_interval(evaluation: Evaluation, metric: str) -> str:
    """A metric in percent with its interval, as in "89.10 (80.02 to 96.31)"."""
    low, high = evaluation.intervals[metric]
    return f"{_percent(evaluation.scores[metric])} ({_percent(low)} to {_percent(high)})"


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"
