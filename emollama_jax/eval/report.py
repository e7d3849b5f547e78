"""An evaluation as JSON, as Markdown beside the published rows, and its confusion matrix as a picture."""

import importlib.util
import io
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from emollama_jax.eval.benchmarks import Evaluation, Published
from emollama_jax.io.atomic import write_bytes, write_json, write_text
from emollama_jax.io.paths import PathLike, as_path
from emollama_jax.text.fonts import DEFAULT_FONT, find_fonts

HEADINGS = {
    "accuracy": "accuracy",
    "weighted_precision": "weighted precision",
    "weighted_recall": "weighted recall",
    "weighted_f1": "weighted F1",
    "macro_precision": "macro precision",
    "macro_recall": "macro recall",
    "macro_f1": "macro F1",
    "uar": "UAR",
    "war": "WAR",
}
OURS = "emollama_jax"


def to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """Everything, in JSON's types; values are fractions of 1."""
    benchmark = evaluation.benchmark
    per_class = {
        label: {name: values[i] for name, values in evaluation.classes.items()}
        for i, label in enumerate(benchmark.labels)
    }
    return {
        "benchmark": benchmark.name,
        "labels": list(benchmark.labels),
        "clips": evaluation.clips,
        "invalid": evaluation.invalid,
        "invalid_counted_as": evaluation.counted_as,
        "scores": evaluation.scores,
        "interval_level": evaluation.level,
        "intervals": {name: list(interval) for name, interval in evaluation.intervals.items()},
        "per_class": per_class,
        "confusion": evaluation.confusion.tolist(),
        "confusion_columns": [*benchmark.labels, "invalid"],
        "order_sensitivity": evaluation.sensitivity,
        "checkpoint": evaluation.checkpoint,
        "valence": evaluation.valence,
        "floor": {"label": evaluation.floor[0], "scores": evaluation.floor[1]},
        "published": [{"who": row.who, "scores": dict(row.scores)} for row in benchmark.published],
    }


def to_markdown(evaluation: Evaluation) -> str:
    """The page: all metrics with their intervals, published rows, classes and the confusion matrix; in percent."""
    benchmark = evaluation.benchmark
    level = f"{100 * evaluation.level:g} % interval"
    metrics = [
        [HEADINGS[name], _percent(value), " to ".join(map(_percent, evaluation.intervals[name]))]
        for name, value in evaluation.scores.items()
    ]
    classes = [
        [label, *(_percent(evaluation.classes[name][i]) for name in ("precision", "recall", "f1")), f"{support:.0f}"]
        for i, (label, support) in enumerate(zip(benchmark.labels, evaluation.classes["support"], strict=True))
    ]
    matrix = [
        [label, *map(str, row)] for label, row in zip(benchmark.labels, evaluation.confusion.tolist(), strict=True)
    ]
    lines = [
        f"# {benchmark.title or benchmark.name}",
        "",
        f"{evaluation.clips} clips, {evaluation.invalid} invalid answers, counted as {evaluation.counted_as}.",
    ]
    if evaluation.sensitivity:
        spread, changed = (_percent(evaluation.sensitivity[name]) for name in ("spread", "changed"))
        first = HEADINGS[benchmark.metrics[0]]
        lines.append(f"Under other orders of the labels {first} spreads over {spread} points; {changed} % of the")
        lines.append("clips change their label.")
    if evaluation.checkpoint:
        lines.append(f"Checkpoint: {evaluation.checkpoint}.")
    if found := evaluation.valence:
        lines.append(
            f"Valence of {found['clips']:.0f} clips: mean squared error {found['mse']:.4f}; weighted F1 less a"
        )
        lines.append(f"quarter of it, by which MER2023 ranks: {_percent(found['combined'])}.")
    headings = {name: HEADINGS[name] for name in benchmark.metrics}
    label, floor = evaluation.floor
    rows = (Published(f"floor: always {label}", floor), *benchmark.published)
    lines += ["", *comparison(headings, evaluation.scores, rows)]
    lines += ["", *table(["metric", "%", level], metrics)]
    lines += ["", *table(["class", "precision", "recall", "F1", "clips"], classes)]
    lines += ["", *table(["true \\ predicted", *benchmark.labels, "invalid"], matrix)]
    return "\n".join(lines) + "\n"


def comparison(
    headings: Mapping[str, str], ours: Mapping[str, float], published: Sequence[Published], *, scale: float = 100.0
) -> list[str]:
    """Ours above the published rows, as a Markdown table; a cell without a value is empty."""
    rows = [Published(f"**{OURS}**", ours), *published]
    cells = [
        [row.who, *(f"{scale * row.scores[name]:.2f}" if name in row.scores else "" for name in headings)]
        for row in rows
    ]
    return table(["", *headings.values()], cells)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, its first column to the left and the others to the right."""
    rule = [":--", *["--:"] * (len(headings) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)]


def plot_confusion(evaluation: Evaluation, file: PathLike) -> None:
    """The confusion matrix as a PNG: shares of each true label, with the numbers of clips. Needs matplotlib.

    Labels in other scripts are drawn in an installed font that has them, or where there is none as their numbers.
    """
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    benchmark, counts = evaluation.benchmark, evaluation.confusion
    if not counts[:, -1].any():
        counts = counts[:, :-1]
    title, labels = benchmark.title or benchmark.name, list(benchmark.labels)
    if (fonts := find_fonts("".join((title, *labels)))) is None:
        logging.warning("no installed font draws the labels; they are numbered in the picture (try Noto Sans CJK)")
        fonts, title, labels = [DEFAULT_FONT], "Labels", [f"label {i}" for i in range(1, 1 + len(labels))]
    columns = [*labels, "invalid"][: counts.shape[1]]
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    side = 1.6 + 0.75 * len(columns)
    picture = io.BytesIO()
    with matplotlib.rc_context({"font.family": fonts}):
        figure = Figure(figsize=(side + 1, side - 0.4), dpi=120, layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for row, column in ((r, c) for r in range(len(counts)) for c in range(len(columns)) if counts[r, c]):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour)
        axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        name = benchmark.metrics[0]
        score = f"{HEADINGS[name]} {_percent(evaluation.scores[name])} %"
        axes.set_title(f"{title}: {score}, {evaluation.clips} clips")
        figure.colorbar(image, label="share of the true label", shrink=0.8)
        figure.savefig(picture, format="png")
    write_bytes(file, picture.getvalue())


def save(evaluation: Evaluation, folder: PathLike) -> None:
    """Writes `evaluation.json`, `evaluation.md` and, where matplotlib is installed, `confusion.png` into a folder,
    which is made if needed. Files of these names are replaced.

    Raises:
        UserError: the folder cannot be written to.
    """
    folder = as_path(folder)
    write_json(folder / "evaluation.json", to_dict(evaluation))
    write_text(folder / "evaluation.md", to_markdown(evaluation))
    if importlib.util.find_spec("matplotlib"):
        plot_confusion(evaluation, folder / "confusion.png")
    else:
        logging.warning("no picture of the confusion matrix: it needs pip install 'emollama_jax[plot]'")


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"
