"""A training run in a notebook, with its loss drawn as it goes."""

import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from emollama_jax.errors import UserError
from emollama_jax.notebook.shell import Command
from emollama_jax.train.plot import draw_loss

METRICS = "metrics.jsonl"  # in the run's folder
SHOWN = 8  # last lines of the command
SAVED = 75  # exit code of a run that was asked to end


def train(workdir: str | Path, *arguments: str, every_s: float = 1.0, stop_at: int | None = None) -> int:
    """Run `emollama train` until its end, draw its loss meanwhile, and return the last step that was logged.

    The notebook's stop button saves the run and ends it; the same call goes on from there.

    Args:
        workdir: the run's folder.
        arguments: of the command, as in `"--config", "forkme", "--config.train.steps=100"`.
        every_s: seconds between two drawings.
        stop_at: a step at which the run is stopped and saved, as when the machine is taken away; a run that has come so
            far is left as it is.

    Raises:
        UserError: the run failed; the message is the command's own.
    """
    from IPython.display import HTML, Image, display

    folder = Path(workdir)
    if stop_at is not None and (done := read_losses(folder)) and done[-1][0] >= stop_at:
        display(Image(draw([(folder.name, done)]), format="png", alt="the training loss"))
        return done[-1][0]
    command = Command(["-m", "emollama_jax", "train", *arguments, f"--config.train.workdir={folder}"])
    picture, text = (display(HTML("<pre>no step is logged yet</pre>"), display_id=True) for _ in range(2))
    shown, asked = 0, False

    def show() -> int:
        nonlocal shown
        logged = read_losses(folder)
        text.update(HTML(f"<pre>{'<br>'.join(map(escape, list(command.lines)[-SHOWN:]))}</pre>"))
        if len(logged) != shown:
            shown = len(logged)
            picture.update(Image(draw([(folder.name, logged)]), format="png", alt="the training loss"))
        return logged[-1][0] if logged else 0

    try:
        while not command.wait(every_s):
            last = show()
            if stop_at is not None and last >= stop_at and not asked:
                command.process.terminate()
                asked = True
    except BaseException as error:
        command.stop()
        if not isinstance(error, KeyboardInterrupt):
            raise
    last = show()
    if command.process.returncode not in (0, SAVED):
        raise command.error("the run ended")
    return last


def read_losses(folder: Path) -> list[tuple[int, float]]:
    """Return the steps that a run has logged, with their losses; a line that is being written is left out.

    Raises:
        UserError: the file of metrics is damaged.
    """
    file = folder / METRICS
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        found = [json.loads(line) for line in lines if line.endswith("\n")]
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{file}: a line is damaged ({error}); look into the file") from error
    return [(line["step"], line["loss"]) for line in found if line.get("loss") is not None]


def draw(runs: Sequence[tuple[str, Sequence[tuple[int, float]]]]) -> bytes:
    """Return the losses of runs as a PNG; see `draw_loss`."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure, file = Figure(figsize=(6, 3), dpi=100, layout="constrained"), io.BytesIO()
    draw_loss(figure, runs)
    figure.savefig(file, format="png")
    return file.getvalue()
