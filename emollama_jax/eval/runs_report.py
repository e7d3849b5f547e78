"""Several runs of one or two systems on the same clips, as JSON and Markdown."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from emollama_jax.eval.comparison import compare, match_predictions, mcnemar, spread
from emollama_jax.eval.report import HEADINGS, OURS, table
from emollama_jax.eval.sweep import Cell
from emollama_jax.io.atomic import write_json, write_text
from emollama_jax.io.paths import PathLike, as_path


@dataclass(frozen=True)
class EvaluatedRun:
    """A run's evaluations, one a frame rule and set of modalities.

    Attributes:
        name: of the run, as it was given.
        selection: how its checkpoint was chosen.
    """

    name: str
    selection: str
    cells: tuple[Cell, ...]


def describe_runs(runs: Sequence[EvaluatedRun], against: Sequence[EvaluatedRun] = ()) -> list[dict[str, Any]]:
    """Compare runs, in JSON's types: for each cell the runs' mean and deviation and, with `against`, the differences.

    Raises:
        UserError: the runs were not evaluated on the same clips.
    """
    rows = []
    for i, cell in enumerate(runs[0].cells):
        systems = [[run.cells[i].evaluated for run in some] for some in (runs, against) if some]
        benchmark = cell.evaluated.evaluation.benchmark
        row: dict[str, Any] = {"data": cell.data, "frame": cell.frame, "modalities": cell.modalities}
        row |= {"label_order": cell.label_order, "title": cell.title}
        row["metrics"] = list(benchmark.metrics)
        for name, system in zip(("runs", "against"), systems, strict=False):
            found = spread([one.evaluation for one in system])
            row[name] = {
                metric: {"mean": one.mean, "deviation": _finite(one.deviation), "values": list(one.values)}
                for metric, one in found.items()
            }
        truth, answers = match_predictions([one.predictions for system in systems for one in system])
        first, second = answers[: len(runs)], answers[len(runs) :]
        if second:
            row["differences"] = {
                metric: asdict(compare(truth, first, second, benchmark.labels, metric)) for metric in benchmark.metrics
            }
            row["mcnemar"] = [asdict(mcnemar(truth, *pair)) for pair in zip(first, second, strict=False)]
        rows.append(row)
    return rows


def to_markdown(
    rows: Sequence[Mapping[str, Any]], runs: Sequence[EvaluatedRun], against: Sequence[EvaluatedRun]
) -> str:
    """The page: how each checkpoint was chosen, mean and deviation of each cell, and the differences; in percent."""
    benchmark = runs[0].cells[0].evaluated.evaluation.benchmark
    lines = [f"# {benchmark.title or benchmark.name}: {len(runs)} runs", ""]
    for heading, some in (("Runs", runs), ("Against", against)):
        lines += [f"{heading}:", ""] if some else []
        lines += [f"- {run.name}: {run.selection}" for run in some] + ([""] if some else [])
    metrics = rows[0]["metrics"]
    cells = []
    for row in rows:
        where = row["title"]
        for name, who in (("runs", f"**{OURS}**"), ("against", "against")):
            if name in row:
                cells.append([f"{who}, {where}", *(_mean(row[name][metric]) for metric in metrics)])
    lines += ["Mean and standard deviation over the runs; percent.", ""]
    lines += table(["", *(HEADINGS[name] for name in metrics)], cells)
    if against:
        lines += ["", "Difference of the means, its 95 % interval by a paired bootstrap over the clips, and p.", ""]
        differences = [[row["title"], *(_difference(row["differences"][m]) for m in metrics)] for row in rows]
        lines += table(["", *(HEADINGS[name] for name in metrics)], differences)
        tests = [
            [
                f"{row['title']}, {one.name} and {other.name}",
                *(str(found[key]) for key in ("only_first", "only_second")),
                f"{found['p']:.3g}",
            ]
            for row in rows
            for one, other, found in zip(runs, against, row["mcnemar"], strict=False)
        ]
        lines += ["", "McNemar's exact test: clips that one run of two alone gets right.", ""]
        lines += table(["", "only the first", "only the second", "p"], tests)
    return "\n".join(lines) + "\n"


def save_runs(runs: Sequence[EvaluatedRun], against: Sequence[EvaluatedRun], folder: PathLike) -> str:
    """Write `runs.json` and `runs.md` into a folder, which is made if needed; returns the page."""
    rows = describe_runs(runs, against)
    page = to_markdown(rows, runs, against)
    chosen = {run.name: run.selection for run in (*runs, *against)}
    write_json(as_path(folder) / "runs.json", {"checkpoints": chosen, "cells": rows})
    write_text(as_path(folder) / "runs.md", page)
    return page


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(found: Mapping[str, Any]) -> str:
    deviation = "" if found["deviation"] is None else f" ± {100 * found['deviation']:.2f}"
    return f"{100 * found['mean']:.2f}{deviation}"


def _difference(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{100 * found['difference']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f}), p {found['p']:.3f}"
