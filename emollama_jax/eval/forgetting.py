"""What a model keeps of an earlier stage: the label score and the caption loss of each stage's checkpoint.

    stages = find_stages(Run.open("runs/stage2"))            # stage 1, whose weights it began with, then stage 2
    rows = measure_forgetting(stages, ["data/merr/frame/1.0.0:val"])
    save_forgetting(rows, Path("results"))

The original's second stage learns captions alone, after which its model no longer gives labels.
"""

import dataclasses
import functools
import importlib.util
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from absl import logging
from flax import nnx

from emollama_jax.config import Config
from emollama_jax.data.datasets import find_images, open_datasets
from emollama_jax.data.pipeline import eval_dataset
from emollama_jax.data.records import Records
from emollama_jax.data.transforms import CAPTIONS
from emollama_jax.errors import UserError
from emollama_jax.eval.benchmarks import Benchmark, Evaluation
from emollama_jax.eval.report import HEADINGS, table
from emollama_jax.eval.sweep import check_labels, evaluate_records, with_interval
from emollama_jax.infer.engine import Engine
from emollama_jax.infer.loading import load_run
from emollama_jax.io.atomic import write_bytes, write_json, write_text
from emollama_jax.io.paths import PathLike, as_path
from emollama_jax.models.emotion_llama import EmotionLlama
from emollama_jax.runs.run import Run
from emollama_jax.text.tokenizers import Tokenizer
from emollama_jax.train.step import multimodal_loss


@dataclass(frozen=True)
class StageRow:
    """A stage's checkpoint on a split.

    Attributes:
        evaluation: of its likeliest labels; None for a split without labels.
        caption_loss: in nats a token of the captions; None for a split without captions.
    """

    stage: str
    step: int
    data: str
    evaluation: Evaluation | None
    caption_loss: float | None


def find_stages(run: Run) -> list[Run]:
    """Return the runs whose weights each began with, the first one first, and the run itself last."""
    stages = [run]
    while (earlier := Run.find(path) if (path := stages[0].config.weights.trained) else None) is not None:
        stages.insert(0, earlier)
    return stages


def find_validation_splits(stages: Sequence[Run]) -> list[str]:
    """Return the data sets FOLDER:SPLIT that any stage was validated on, each once.

    Raises:
        UserError: there is none.
    """
    found = list(dict.fromkeys(path for stage in stages for path in stage.config.train.validation))
    if not found:
        raise UserError("no stage was validated (train.validation); give the clips to measure on with --data")
    return found


def measure_forgetting(
    stages: Sequence[Run], paths: Sequence[str], *, batch_size: int = 16, log: Callable[[str], None] = logging.info
) -> list[StageRow]:
    """Measure each stage's checkpoint on each split.

    Args:
        paths: data sets FOLDER:SPLIT, which hold labels, captions or both.
        log: is told of each result, a line each.

    Raises:
        UserError: a split has neither labels nor captions, or a run cannot be loaded.
    """
    rows = []
    for stage in stages:
        config, model, tokenizer = stage.config_for_inference(), None, None
        for path in paths:
            (dataset,) = open_datasets([path], config, "--data")
            stage.check_encoders(dataset.encoders)
            if model is None:
                model, tokenizer = load_run(stage, images=find_images([dataset]))
            labels, task = _answered(dataset.records)
            evaluation = None
            if labels:
                benchmark = Benchmark(name="prompt.labels", title="Labels", labels=config.prompt.labels)
                check_labels(dataset.records, benchmark)
                engine = Engine(model, tokenizer, config)
                evaluation = evaluate_records(engine, dataset.records, benchmark, batch_size=batch_size).evaluation
            loss = caption_loss(model, tokenizer, config, path, task) if task else None
            rows.append(StageRow(str(stage.path), stage.step, path, evaluation, loss))
            log(f"{stage.path}, step {stage.step}, {path}: {_line(rows[-1])}")
    return rows


def caption_loss(model: EmotionLlama, tokenizer: Tokenizer, config: Config, path: str, task: str) -> float:
    """Return the mean loss of a split's captions, in nats a token.

    Args:
        task: reason (the coarse captions) or reason_v2 (the fine ones).
    """
    config = dataclasses.replace(
        config,
        prompt=dataclasses.replace(config.prompt, tasks=(task,), task_weights=()),
        data=dataclasses.replace(config.data, eval=(path,), batch_rows=4, workers=0),
        train=dataclasses.replace(config.train, loss_average="token"),
    )
    graphdef, state = nnx.split(model)
    total = weight = 0.0
    for batch in eval_dataset(config, tokenizer):
        loss, targets = _loss(graphdef, state, batch)
        total, weight = total + float(loss) * float(targets), weight + float(targets)
    return total / weight


@functools.partial(jax.jit, static_argnames="graphdef")
def _loss(graphdef, state, batch):
    return multimodal_loss(nnx.merge(graphdef, state), batch, None)


def _answered(records: Records) -> tuple[bool, str | None]:
    """Whether a split's clips have labels, and the task whose captions most of them have. Raises UserError."""
    answers = records.metadata["answers"][records.split]
    counts = {task: sum(answers[caption]) for task, caption in CAPTIONS.items()}
    task = max(counts, key=lambda task: counts[task])
    labels = any(index >= 0 for index in answers["emotion"])
    if not labels and not counts[task]:
        raise UserError(f"{records.path}:{records.split} has neither labels nor captions; give other data")
    return labels, task if counts[task] else None


def save_forgetting(rows: Sequence[StageRow], folder: PathLike) -> str:
    """Write `forgetting.json`, `forgetting.md` and, with matplotlib, `forgetting.png`; returns the page."""
    folder, page = as_path(folder), to_markdown(rows)
    write_json(folder / "forgetting.json", [_to_dict(row) for row in rows])
    write_text(folder / "forgetting.md", page)
    if importlib.util.find_spec("matplotlib"):
        plot_forgetting(rows, folder / "forgetting.png")
    return page


def to_markdown(rows: Sequence[StageRow]) -> str:
    """A row for each checkpoint and split; label scores in percent."""
    headings = ["checkpoint", "clips", "labelled", HEADINGS["weighted_f1"], "caption loss, nats a token"]
    cells = [
        [
            f"{row.stage}, step {row.step}",
            row.data,
            str(row.evaluation.clips) if row.evaluation else "",
            with_interval(row.evaluation, "weighted_f1") if row.evaluation else "",
            "" if row.caption_loss is None else f"{row.caption_loss:.3f}",
        ]
        for row in rows
    ]
    return "\n".join(["# What each stage keeps", "", *table(headings, cells)]) + "\n"


def plot_forgetting(rows: Sequence[StageRow], file: PathLike) -> None:
    """Draw the label score and the caption loss over the stages, a line for each split, as a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    stages = list(dict.fromkeys(row.stage for row in rows))
    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    axes = figure.subplots(1, 2)
    for data in dict.fromkeys(row.data for row in rows):
        of_data = [row for row in rows if row.data == data]
        scored = [(stages.index(row.stage), row.evaluation) for row in of_data if row.evaluation]
        if scored:
            places, found = zip(*scored, strict=True)
            values = [one.scores["weighted_f1"] for one in found]
            low, high = zip(*(one.intervals["weighted_f1"] for one in found), strict=True)
            ends = [[max(0, v - e) for v, e in zip(values, low, strict=True)]]
            ends.append([max(0, e - v) for v, e in zip(values, high, strict=True)])
            axes[0].errorbar(places, values, yerr=ends, marker="o", capsize=3, label=data)
        losses = [(stages.index(row.stage), row.caption_loss) for row in of_data if row.caption_loss is not None]
        if losses:
            axes[1].plot(*zip(*losses, strict=True), marker="o", label=data)
    names = [Path(stage).name for stage in stages]
    for one, title in zip(axes, ("weighted F1 of labels", "caption loss, nats a token"), strict=True):
        one.set_xticks(range(len(names)), names)
        one.set_title(title)
        one.set_ylim(bottom=0)
        one.legend(fontsize="small")
    axes[0].set_ylim(0, 1)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(file, picture.getvalue())


def _line(row: StageRow) -> str:
    shown = [f"weighted F1 {with_interval(row.evaluation, 'weighted_f1')} %"] if row.evaluation else []
    return ", ".join([*shown, *([f"caption loss {row.caption_loss:.3f}"] if row.caption_loss is not None else [])])


def _to_dict(row: StageRow) -> dict[str, Any]:
    found = {"stage": row.stage, "step": row.step, "data": row.data, "caption_loss": row.caption_loss}
    if row.evaluation:
        found |= {"clips": row.evaluation.clips, "scores": row.evaluation.scores}
        found["intervals"] = {name: list(ends) for name, ends in row.evaluation.intervals.items()}
    return found
