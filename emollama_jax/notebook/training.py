"""A training run in a notebook, with its loss drawn as it goes."""

import io
import json
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from emollama_jax.errors import UserError
from emollama_jax.notebook.shell import find_python
from emollama_jax.train.plot import draw_loss

METRICS = "metrics.jsonl"  # in the run's folder
KEPT = 6  # last lines of the command that are shown
SAVED = 75  # exit code of a run that was asked to end
NOTHING = "no step is logged yet"


def train(workdir: str | Path, *arguments: str, every_s: float = 3.0, stop_at: int | None = None) -> int:
    """Run `emollama train` until its end, draw its loss meanwhile, and return the last step that was logged.

    The notebook's stop button saves the run and ends it; the same call goes on from there.

    Args:
        workdir: the run's folder.
        arguments: of the command, as in `"--config", "forkme", "--config.train.steps=100"`.
        every_s: seconds between two drawings.
        stop_at: a step at which the run is stopped, as if the machine had been taken away.

    Raises:
        UserError: the run failed; the message is the command's own.
    """
    from IPython.display import HTML, Image, display

    folder = Path(workdir)
    command = [find_python(), "-m", "emollama_jax", "train", *arguments, f"--config.train.workdir={folder}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    lines, asked = deque[str](maxlen=KEPT), False
    reader = threading.Thread(target=lambda: lines.extend(line.rstrip() for line in process.stdout), daemon=True)
    reader.start()
    picture, text = display(HTML(NOTHING), display_id=True), display(HTML(""), display_id=True)
    shown = 0

    def show() -> None:
        nonlocal shown
        logged = read_losses(folder)
        text.update(HTML(f"<pre>{'<br>'.join(lines)}</pre>"))
        if len(logged) > shown:
            shown = len(logged)
            picture.update(Image(draw([(folder.name, logged)]), format="png"))

    try:
        while not _ended(process, every_s):
            show()
            if stop_at is not None and not asked and last_step(folder) >= stop_at:
                process.terminate()
                asked = True
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        print(f"stopped and saved: run the cell again, and it goes on from {folder}")
    except BaseException:
        process.terminate()
        raise
    reader.join(timeout=5)
    show()
    if process.returncode not in (0, SAVED):
        said = [line for line in lines if ": error: " in line] or list(lines) or [f"exit code {process.returncode}"]
        raise UserError(f"the run ended: {said[-1]}")
    return last_step(folder)


def read_losses(folder: Path) -> list[tuple[int, float]]:
    """Return the steps that a run has logged, with their losses; a line that is being written is left out."""
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    found = (json.loads(line) for line in lines if line.endswith("\n"))
    return [(line["step"], line["loss"]) for line in found if line.get("loss") is not None]


def last_step(folder: Path) -> int:
    """Return the last step that a run has logged; 0 before the first."""
    logged = read_losses(folder)
    return logged[-1][0] if logged else 0


def draw(runs: Sequence[tuple[str, Sequence[tuple[int, float]]]], draw_on: Callable = draw_loss) -> bytes:
    """Return the losses of runs as a PNG."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure, file = Figure(figsize=(6, 3), dpi=100, layout="constrained"), io.BytesIO()
    draw_on(figure, runs)
    figure.savefig(file, format="png")
    return file.getvalue()


def _ended(process: subprocess.Popen, seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True
