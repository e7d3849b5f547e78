"""A model judged by a benchmark: its answers about the clips of a split, by modalities and by frame rules.

    evaluated = evaluate_records(model, tokenizer, config, records, benchmark_of("mer2023"), modalities="AV")
    cells = sweep(model, tokenizer, config, [first, middle], benchmark, modalities=["AVT", "A"])
    save_sweep(cells, Path("results"))

The clips without a label are left out.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emollama_jax.config import Config
from emollama_jax.data.records import Records
from emollama_jax.errors import UserError
from emollama_jax.eval.benchmarks import Benchmark, Evaluation, Published, evaluate
from emollama_jax.eval.report import HEADINGS, OURS, save, table, to_dict
from emollama_jax.infer.predictor import ALL, Predictor, batches_of, predict_labels
from emollama_jax.infer.score import label_orders
from emollama_jax.models.emotion_llama import EmotionLlama
from emollama_jax.text.answers import parse_label
from emollama_jax.text.prompts import emotion_question, request
from emollama_jax.text.tokenizers import Tokenizer

WAYS = ("score", "generate")
PREDICTIONS = "predictions.jsonl"
DIGITS = 6  # of a probability

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Prediction:
    """What was said about a clip.

    Attributes:
        emotion: its own label; None where it has none.
        answer: a label, or the text that was generated.
        label: that the answer ends with; None for an invalid answer.
        probabilities: of each label, where they were scored.
    """

    name: str
    emotion: str | None
    answer: str
    label: str | None
    probabilities: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Evaluated:
    """An evaluation with the predictions it is of, those of clips without a label too."""

    evaluation: Evaluation
    predictions: tuple[Prediction, ...]

    @property
    def unlabelled(self) -> int:
        return sum(prediction.emotion is None for prediction in self.predictions)

    def save(self, folder: Path) -> None:
        """Writes what `report.save` does, and the predictions."""
        save(self.evaluation, folder)
        lines = [json.dumps(dataclasses.asdict(one), ensure_ascii=False) + "\n" for one in self.predictions]
        (folder / PREDICTIONS).write_text("".join(lines), encoding="utf-8")


def evaluate_records(
    model: EmotionLlama,
    tokenizer: Tokenizer,
    config: Config,
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
    """The model's labels for the clips of a split, judged.

    Args:
        config: the model's; the benchmark's labels go in place of its prompt's.
        orders: of the labels in the question; with more than one the evaluation says how much depends on them.
        by: "score" takes the likeliest label, "generate" the one that the generated answer ends with (of several
            orders, the one said most often).
        invalid: see `confusion_matrix`.

    Raises:
        UserError: no clip has a label, one has a label outside the benchmark's, or as `predict_labels`.
    """
    if by not in WAYS:
        raise UserError(f"by {by!r}: give one of {', '.join(WAYS)}")
    _check_labels(records, benchmark)
    prompt = dataclasses.replace(config.prompt, labels=benchmark.labels)
    config = dataclasses.replace(config, prompt=prompt)
    settings = {"modalities": modalities, "orders": orders, "batch_size": batch_size, "progress": progress}
    ask = _scored if by == "score" else _generated
    predictions, by_order = ask(model, tokenizer, config, records, **settings)
    labelled = [i for i, prediction in enumerate(predictions) if prediction.emotion is not None]
    evaluation = evaluate(
        benchmark,
        [predictions[i].emotion for i in labelled],
        [predictions[i].label for i in labelled],
        by_order=[[answers[i] for i in labelled] for answers in by_order] if orders > 1 else (),
        invalid=invalid,
    )
    return Evaluated(evaluation, tuple(predictions))


def _check_labels(records: Records, benchmark: Benchmark) -> None:
    """Raises UserError, before any work, where the clips have no labels or others than the benchmark's."""
    where, answers = f"{records.path}:{records.split}", records.metadata["answers"][records.split]
    found = {records.metadata["labels"][index] for index in answers["emotion"] if index >= 0}
    if not found:
        raise UserError(f"no clip has a label: {where}; give data that has them")
    if unknown := sorted(found - set(benchmark.labels)):
        raise UserError(
            f"{where} has clips with the label {unknown[0]!r}, {benchmark.title or benchmark.name} has "
            f"{', '.join(benchmark.labels)}; give that benchmark's data, or evaluate by the data's own labels"
        )


Asked = tuple[list[Prediction], list[list[str | None]]]


def _scored(model: EmotionLlama, tokenizer: Tokenizer, config: Config, records: Records, **settings: Any) -> Asked:
    """The predictions, and the labels under each order, [O][N]."""
    found = predict_labels(model, tokenizer, config, records, **settings)
    scores, best = found.scores, found.scores.best
    predictions = []
    for i, (name, emotion) in enumerate(zip(found.names, found.truth, strict=True)):
        values = [round(float(p), DIGITS) for p in scores.probabilities[i]]
        probabilities = dict(zip(scores.labels, values, strict=True))
        predictions.append(Prediction(name, emotion, best[i], best[i], probabilities))
    return predictions, [list(labels) for labels in scores.best_by_order]


def _generated(
    model: EmotionLlama,
    tokenizer: Tokenizer,
    config: Config,
    records: Records,
    *,
    modalities: str,
    orders: int,
    batch_size: int,
    progress: Progress,
) -> Asked:
    labels = config.prompt.labels
    predictor = Predictor(model, tokenizer, config, modalities=modalities, orders=orders)
    requests = [request("emotion", emotion_question(order)) for order in label_orders(labels, orders)]
    predictions: list[Prediction] = []
    by_order: list[list[str | None]] = [[] for _ in requests]
    for clips, truth in batches_of(records, batch_size):
        for clip in clips:
            predictor.check(clip)
        soft = predictor.soft_tokens(clips)
        texts = [[answer for (answer,) in predictor.answers(clips, soft, [[asked]] * len(clips))] for asked in requests]
        found = [[parse_label(text, labels) for text in of_order] for of_order in texts]
        for i, (clip, emotion) in enumerate(zip(clips, truth, strict=True)):
            said = Counter(of_order[i] for of_order in found if of_order[i] is not None)
            label = said.most_common(1)[0][0] if said else None
            text = next((texts[o][i] for o in range(orders) if found[o][i] == label), "")
            predictions.append(Prediction(clip.name, emotion, text, label))
        for all_, new in zip(by_order, found, strict=True):
            all_ += new
        progress(len(clips))
    return predictions, by_order


@dataclass(frozen=True)
class Cell:
    """One evaluation of a sweep: which clips were seen how."""

    data: str
    frame: str
    modalities: str
    evaluated: Evaluated

    @property
    def name(self) -> str:
        return f"{self.frame}-{self.modalities}"


def sweep(
    model: EmotionLlama,
    tokenizer: Tokenizer,
    config: Config,
    splits: Sequence[Records],
    benchmark: Benchmark,
    *,
    modalities: Sequence[str] = (ALL,),
    **settings: Any,
) -> list[Cell]:
    """Evaluates each split, as a rule the same clips prepared by several frame rules, under each set of modalities.

    Args:
        settings: of `evaluate_records`.

    Raises:
        UserError: two splits have the same frame rule, or as `evaluate_records`.
    """
    frames = [str(records.metadata["recipe"]["frame_rule"]) for records in splits]
    if len(set(frames)) < len(frames):
        raise UserError(f"data of the frame rules {', '.join(frames)}: give each rule once, or evaluate one by one")
    return [
        Cell(
            f"{records.path}:{records.split}",
            frame,
            some,
            evaluate_records(model, tokenizer, config, records, benchmark, modalities=some, **settings),
        )
        for records, frame in zip(splits, frames, strict=True)
        for some in modalities
    ]


def save_sweep(cells: Sequence[Cell], folder: Path) -> None:
    """Writes one evaluation into the folder, several into folders in it, with `sweep.json` and `sweep.md` over all."""
    if len(cells) == 1:
        cells[0].evaluated.save(folder)
        return
    for cell in cells:
        cell.evaluated.save(folder / cell.name)
    rows = [
        {"data": cell.data, "frame": cell.frame, "modalities": cell.modalities, **to_dict(cell.evaluated.evaluation)}
        for cell in cells
    ]
    (folder / "sweep.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "sweep.md").write_text(sweep_markdown(cells), encoding="utf-8")


def sweep_markdown(cells: Sequence[Cell]) -> str:
    """A row for each evaluation, above the published ones; in percent."""
    first = cells[0].evaluated.evaluation
    benchmark, metrics = first.benchmark, list(first.benchmark.metrics)
    headings = [HEADINGS[name] for name in metrics]
    if first.sensitivity:
        metrics.append("spread")
        headings.append(f"{headings[0]} spread by label order")
    rows = []
    for cell in cells:
        evaluation = cell.evaluated.evaluation
        who = f"**{OURS}**, {cell.modalities}, {cell.frame} frame"
        rows.append(Published(who, evaluation.scores | evaluation.sensitivity))
    body = [
        [row.who, *(f"{100 * row.scores[name]:.2f}" if name in row.scores else "" for name in metrics)]
        for row in (*rows, *benchmark.published)
    ]
    title = f"# {benchmark.title or benchmark.name}"
    return "\n".join([title, "", f"{first.clips} clips; percent.", "", *table(["", *headings], body)]) + "\n"
