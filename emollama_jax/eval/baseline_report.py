"""Heads on stored features as JSON and Markdown, beside the published rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emollama_jax.eval.benchmarks import Evaluation
from emollama_jax.eval.comparison import Spread, spread
from emollama_jax.eval.report import HEADINGS, OURS, table
from emollama_jax.io.atomic import write_json, write_text
from emollama_jax.io.paths import PathLike, as_path


@dataclass(frozen=True)
class BaselineRow:
    """The heads of one choice of features.

    Attributes:
        name: of the choice: a feature, A, V or all.
        features: which it is.
        evaluations: of heads that differ in their seed.
        losses: of these, the mean loss of the clips' labels in nats.
    """

    name: str
    features: tuple[str, ...]
    evaluations: tuple[Evaluation, ...]
    losses: tuple[float, ...]


def save_baselines(rows: Sequence[BaselineRow], head: str, folder: PathLike) -> None:
    """Write `baseline.json` and `baseline.md` into a folder, which is made if needed."""
    first = rows[0].evaluations[0]
    label, floor = first.floor
    found = [
        {"inputs": row.name, "features": list(row.features), "clips": row.evaluations[0].clips}
        | {"label_loss": list(row.losses)}
        | {"scores": {name: list(one.values) for name, one in spread(row.evaluations).items()}}
        for row in rows
    ]
    results = {"benchmark": first.benchmark.name, "head": head, "floor": {"label": label, "scores": floor}}
    write_json(as_path(folder) / "baseline.json", results | {"rows": found})
    write_text(as_path(folder) / "baseline.md", to_markdown(rows, head))


def to_markdown(rows: Sequence[BaselineRow], head: str) -> str:
    """A row for each choice of features, above the floor and the published rows; in percent."""
    first = rows[0].evaluations[0]
    benchmark, (label, floor) = first.benchmark, first.floor
    cells = []
    for row in rows:
        found = spread(row.evaluations)
        name = row.name if row.features == (row.name,) else f"{row.name}: {', '.join(row.features)}"
        loss = f"{np.mean(row.losses):.2f}"
        cells.append([f"**{OURS}**, {name}", *(_mean(found[metric]) for metric in benchmark.metrics), loss])
    cells.append([f"floor: always {label}", *(f"{100 * floor[metric]:.2f}" for metric in benchmark.metrics), ""])
    for published in benchmark.published:
        scores = published.scores
        values = (f"{100 * scores[metric]:.2f}" if metric in scores else "" for metric in benchmark.metrics)
        cells.append([published.who, *values, ""])
    seeds = len(rows[0].evaluations)
    note = f"{first.clips} clips; percent, mean and standard deviation of {seeds} heads ({head})."
    title = f"# {benchmark.title or benchmark.name}: heads on stored features"
    headings = ["", *(HEADINGS[metric] for metric in benchmark.metrics), "label loss, nats"]
    lines = [title, "", note, "", *table(headings, cells)]
    return "\n".join(lines) + "\n"


def _mean(found: Spread) -> str:
    several = f" ± {100 * found.deviation:.2f}" if len(found.values) > 1 else ""
    return f"{100 * found.mean:.2f}{several}"
