"""What a run measures, and where it goes: JSON lines, TensorBoard's event files and the terminal.

Writers have the method names of clu's MetricWriter (`write_scalars`, `flush`, `close`), whose own ones need TensorFlow.
"""

import io
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from etils import epath

from emollama_jax.io.json_lines import JsonLinesFile

METRICS = "metrics.jsonl"


@runtime_checkable
class Writer(Protocol):
    """A place for metrics."""

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line, `step` first, in `metrics.jsonl`; what is not finite is null.

    The lines of a run that goes on from step `after` are kept up to that step, so that each step is there once.
    """

    def __init__(self, folder: epath.Path, *, after: int):
        self._file = JsonLinesFile(folder / METRICS, keep=lambda line: line["step"] <= after)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in scalars.items()}
        self._file.append([{"step": step, **finite}], durable=False)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.flush()


class TensorBoard:
    """Event files; those of steps after `after` are hidden by TensorBoard."""

    def __init__(self, folder: epath.Path, *, after: int):
        from tensorboardX import SummaryWriter  # takes seconds where torch is found, which it imports

        self._writer = SummaryWriter(str(folder), purge_step=after + 1)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        for name, value in scalars.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Progress:
    """One line on a terminal, written over again; whole lines elsewhere."""

    def __init__(self, steps: int, out: io.TextIOBase | None = None):
        """`steps` is where the run ends; `out` is standard error by default."""
        self._steps, self._out = steps, out or sys.stderr
        self._terminal, self._shown = self._out.isatty(), 0
        self._since: tuple[int, float] | None = None

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        now = time.monotonic()
        first, start = self._since = self._since or (step, now)
        parts = [f"step {step:,}/{self._steps:,}"]
        for name, form in FORMATS.items():
            if name in scalars:
                parts.append(form.format(scalars[name]))
        if step > first and "loss" in scalars:
            parts.append(f"{_duration((now - start) / (step - first) * (self._steps - step))} left")
        line = "  ".join(parts)
        if self._terminal:
            self._out.write(f"\r{line:<{self._shown}}")
            self._shown = len(line)
        else:
            self._out.write(f"{line}\n")
        self._out.flush()

    def log(self, message: str) -> None:
        """A line that stays."""
        if self._shown:
            self._out.write("\n")
            self._shown = 0
        self._out.write(f"{message}\n")
        self._out.flush()

    def flush(self) -> None:
        self._out.flush()

    def close(self) -> None:
        if self._shown:
            self._out.write("\n")
            self._shown = 0


FORMATS = {
    "loss": "loss {:.4f}",
    "validation_loss": "validation loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "targets_per_s": "{:,.0f} targets/s",
    "clips_per_s": "{:,.1f} clips/s",
    "fill": "fill {:.0%}",
    "mfu": "MFU {:.1%}",
    "data_wait": "data wait {:.1%}",
}


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


class MultiWriter:
    """All of several writers."""

    def __init__(self, writers: Sequence[Writer]):
        self._writers = tuple(writers)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
