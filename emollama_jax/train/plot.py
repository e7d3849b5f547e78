"""A picture of how runs went."""

from collections.abc import Sequence
from pathlib import Path

from emollama_jax.io.json_lines import read_json_lines
from emollama_jax.train.metrics import METRICS

SMOOTH = 0.8  # how much of the running mean a logged step keeps


def plot_loss(workdirs: Sequence[Path], file: Path) -> None:
    """The training loss of runs, one behind the other, as a PNG: each logged step, and the running mean. Needs
    matplotlib."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    before = 0
    for number, workdir in enumerate(workdirs):
        lines = read_json_lines(workdir / METRICS)
        logged = [(before + line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
        if not logged:
            continue
        steps, losses = zip(*logged, strict=True)
        means, total, weight = [], 0.0, 0.0  # divided by its weight, the mean does not lean on how it began
        for loss in losses:
            total, weight = SMOOTH * total + loss, SMOOTH * weight + 1
            means.append(total / weight)
        axes.plot(steps, losses, ".", color=f"C{number}", alpha=0.3)
        axes.plot(steps, means, color=f"C{number}", label=workdir.name)
        before = steps[-1]
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a target token")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(file, format="png")
