"""A picture of how runs went. Drawing needs matplotlib alone: notebooks draw, too."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SMOOTH = 0.8  # how much of the running mean a logged step keeps


def plot_loss(workdirs: Sequence[Path], file: Path) -> None:
    """The training loss of runs, one behind the other, as a PNG: see `draw_loss`. Needs matplotlib."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    from emollama_jax.io.json_lines import read_json_lines
    from emollama_jax.train.metrics import METRICS

    runs = []
    for workdir in workdirs:
        lines = read_json_lines(workdir / METRICS)
        runs.append((workdir.name, [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]))
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    draw_loss(figure, runs)
    figure.savefig(file, format="png")


def draw_loss(figure: Any, runs: Sequence[tuple[str, Sequence[tuple[int, float]]]]) -> None:
    """Draw the loss of runs on a figure of matplotlib, one behind the other: each logged step, and the running mean.

    Args:
        runs: the name of each, and its logged steps with their losses.
    """
    axes = figure.subplots()
    before = 0
    for number, (name, logged) in enumerate(runs):
        if not logged:
            continue
        steps, losses = [before + step for step, _ in logged], [loss for _, loss in logged]
        means, total, weight = [], 0.0, 0.0  # divided by its weight, the mean does not lean on how it began
        for loss in losses:
            total, weight = SMOOTH * total + loss, SMOOTH * weight + 1
            means.append(total / weight)
        axes.plot(steps, losses, ".", color=f"C{number}", alpha=0.3)
        axes.plot(steps, means, color=f"C{number}", label=name)
        before = steps[-1]
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a target token")
    axes.set_ylim(bottom=0)
    if before:
        axes.legend()
