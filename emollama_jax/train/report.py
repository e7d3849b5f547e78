"""The numbers of each step, fetched from the devices one step late, and made into metrics.

Axes: B rows, K clips a row.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, UInt32

from emollama_jax.config import Config
from emollama_jax.data.batch import Batch
from emollama_jax.data.datasets import IndexedRecords, find_clip_name
from emollama_jax.io.stopwatch import Stopwatch
from emollama_jax.train.metrics import Writer
from emollama_jax.train.optimizer import learning_rate
from emollama_jax.train.speed import Cost, device_peak_flops

SKIPS_IN_A_ROW = 10  # of steps that are not finite, before a run that skips them ends
NOT_TRAINING = ("start", "compile", "validation", "checkpoint")


@dataclass(frozen=True)
class StepReport:
    """A step that is done: whether its loss and gradient were finite, and the names of its clips if they were not."""

    step: int
    is_finite: bool
    clips: tuple[str, ...] = ()


class NonFiniteError(Exception):
    """A step whose loss or gradient was not finite.

    Attributes:
        step: which one.
    """

    def __init__(self, report: StepReport):
        clips = ", ".join(report.clips)
        super().__init__(f"step {report.step}: the loss or its gradient is not finite; clips of the batch: {clips}")
        self.step = report.step


class NonFinitePolicy:
    """Decides whether a step that is not finite ends the run.

    Args:
        skip: such a step is only logged, unless it is the tenth in a row.
    """

    def __init__(self, *, skip: bool, log: Callable[[str], None]):
        self._skip, self._log, self._in_a_row = skip, log, 0

    def check(self, report: StepReport | None) -> None:
        """Takes the next report. Raises NonFiniteError where the step ends the run."""
        if report is None:
            return
        self._in_a_row = 0 if report.is_finite else self._in_a_row + 1
        if not report.is_finite:
            error = NonFiniteError(report)
            if not self._skip or self._in_a_row == SKIPS_IN_A_ROW:
                raise error
            self._log(f"{error}; skipped")


def make_describe(mesh: Mesh) -> Callable[[Batch], dict[str, Array]]:
    """Make the compiled function from a batch to what is reported of it, on every process.

    It gives the numbers of `tokens` and `clips`; `clip` int32 [B, K], which clips (-1 for none); and `batch` uint32, a
    hash of the tokens and clips in their places.
    """

    def describe(batch):
        return {
            "tokens": (batch.segment_ids > 0).sum(dtype=jnp.int32),
            "clips": batch.clip_mask.sum(dtype=jnp.int32),
            "clip": batch.clip,
            "batch": _hash(batch.tokens) + 31 * _hash(batch.clip),
        }

    return jax.jit(describe, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _hash(values: Int[Array, "..."]) -> UInt32[Array, ""]:
    """Hash the values in their places: integer sums, which no sharding changes."""

    def mix(x):  # MurmurHash3's last step
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    places = jnp.arange(values.size, dtype=jnp.uint32).reshape(values.shape)
    return mix(values.astype(jnp.uint32) + mix(places)).sum(dtype=jnp.uint32)


class Report:
    """Makes lines of metrics from the arrays of steps."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        writer: Writer,
        watch: Stopwatch,
        datasets: Sequence[IndexedRecords],
        cost: Cost,
    ):
        self._settings, self._positions = config.train, config.data.batch_rows * config.data.sequence_length
        self._writer, self._watch, self._datasets, self._cost = writer, watch, datasets, cost
        self._pending: tuple[int, Mapping[str, Array]] | None = None
        self._since: dict[str, float] = {}  # sums since the last line
        self._marks = self._now()
        peak = device_peak_flops(mesh.devices.flat[0].device_kind)
        self._peak = peak and peak.flops * mesh.devices.size

    def add(self, step: int, values: Mapping[str, Array]) -> StepReport | None:
        """Takes a step's arrays, and reports the step before, if there is one."""
        before, self._pending = self._pending, (step, values)
        return self._report(*before) if before else None

    def flush(self) -> StepReport | None:
        """Reports the last step, waiting for it; None if it has been reported."""
        before, self._pending = self._pending, None
        return self._report(*before) if before else None

    def _report(self, step: int, values: Mapping[str, Array]) -> StepReport:
        found = jax.device_get(values)
        is_finite = math.isfinite(found["loss"]) and math.isfinite(found["grad_norm"])
        for name in ("tokens", "targets", "clips"):
            self._since[name] = self._since.get(name, 0) + int(found[name])
        if step % self._settings.log_interval == 0 or not is_finite:
            self._writer.write_scalars(step, self._scalars(step, found) | ({} if is_finite else {"skipped": True}))
        numbers = [] if is_finite else [int(number) for number in found["clip"].ravel() if number >= 0]
        return StepReport(step, is_finite, tuple(find_clip_name(self._datasets, number) for number in numbers))

    def _scalars(self, step: int, found: Mapping[str, Any]) -> dict[str, Any]:
        start, self._marks = self._marks, self._now()
        seconds = {name: now - start[name] for name, now in self._marks.items()}
        working = max(seconds["elapsed"] - sum(seconds[name] for name in NOT_TRAINING), 1e-9)
        per_second = {name: total / working for name, total in self._since.items()}
        scalars = {
            "loss": float(found["loss"]),
            "grad_norm": float(found["grad_norm"]),
            "learning_rate": float(learning_rate(self._settings, step - 1)),
            "targets": int(found["targets"]),
            "tokens": int(found["tokens"]),
            "clips": int(found["clips"]),
            "fill": int(found["tokens"]) / self._positions,
            "batch": f"{int(found['batch']):08x}",
            "tokens_per_s": per_second["tokens"],
            "targets_per_s": per_second["targets"],
            "clips_per_s": per_second["clips"],
            "data_wait": seconds["data"] / working,
            "goodput": self._watch.rest_share(),
        }
        if self._peak:
            tokens, length = per_second["tokens"], self._since["tokens"] / max(self._since["clips"], 1)
            scalars["mfu_4n"] = self._cost.flops_4n(tokens) / self._peak
            scalars["mfu"] = self._cost.flops(tokens, length) / self._peak
        self._since = {}
        return scalars

    def _now(self) -> dict[str, float]:
        spent = {name: self._watch.seconds.get(name, 0.0) for name in (*NOT_TRAINING, "data")}
        return {"elapsed": self._watch.elapsed(), **spent}
