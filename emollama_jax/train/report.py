"""The numbers of each step, fetched from the devices one step late, and made into metrics.

Axes: B rows, K clips a row.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, UInt32

from emollama_jax.data.batch import Batch
from emollama_jax.data.datasets import IndexedRecords, find_clip_name
from emollama_jax.train.metrics import Stopwatch, Writer
from emollama_jax.train.speed import Cost, device_peak_flops

SKIPS_IN_A_ROW = 10  # of steps that are not finite, before a run that skips them ends
NOT_TRAINING = ("start", "compile", "validation", "checkpoint")


class NonFiniteError(Exception):
    """A step whose loss or gradient was not finite.

    Attributes:
        step: which one.
        clips: the names of its batch's clips.
    """

    def __init__(self, step: int, clips: Sequence[str]):
        super().__init__(f"step {step}: the loss or its gradient is not finite; clips of the batch: {', '.join(clips)}")
        self.step, self.clips = step, clips


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
    """From the arrays of steps to lines of metrics."""

    def __init__(
        self,
        writer: Writer,
        watch: Stopwatch,
        datasets: Sequence[IndexedRecords],
        *,
        positions: int,
        cost: Cost,
        devices: Sequence[jax.Device],
        rate: Callable[[int], float],
        interval: int,
        skip: bool,
        log: Callable[[str], None],
    ):
        """
        Args:
            positions: of a batch: rows by their length.
            devices: of the mesh, whose peak the speed is compared with.
            rate: from a step's number to its learning rate.
            interval: steps between lines.
            skip: whether a step that is not finite is only told of.
        """
        self._writer, self._watch, self._datasets = writer, watch, datasets
        self._positions, self._cost, self._rate, self._interval, self._skip = positions, cost, rate, interval, skip
        self._log = log
        self._pending: tuple[int, Mapping[str, Array]] | None = None
        self._skipped = 0
        self._since: dict[str, float] = {}  # sums since the last line
        self._marks = self._now()
        peak = device_peak_flops(devices[0].device_kind)
        self._peak = peak and peak.flops * len(devices)

    def add(self, step: int, values: Mapping[str, Array]) -> None:
        """Takes a step's arrays, and reports the step before.

        Raises:
            NonFiniteError: that one was not finite, and such steps are not skipped, or were too often in a row.
        """
        before, self._pending = self._pending, (step, values)
        if before:
            self._report(*before)

    def flush(self) -> None:
        """Reports the last step, waiting for it. Raises NonFiniteError as `add`."""
        before, self._pending = self._pending, None
        if before:
            self._report(*before)

    def _report(self, step: int, values: Mapping[str, Array]) -> None:
        found = jax.device_get(values)
        finite = math.isfinite(found["loss"]) and math.isfinite(found["grad_norm"])
        for name in ("tokens", "targets", "clips"):
            self._since[name] = self._since.get(name, 0) + int(found[name])
        if step % self._interval == 0 or not finite:
            self._writer.write_scalars(step, self._scalars(step, found) | ({} if finite else {"skipped": True}))
        self._skipped = 0 if finite else self._skipped + 1
        if not finite:
            clips = [find_clip_name(self._datasets, int(number)) for number in found["clip"].ravel() if number >= 0]
            error = NonFiniteError(step, clips)
            if not self._skip or self._skipped == SKIPS_IN_A_ROW:
                self._writer.flush()
                raise error
            self._log(f"{error}; skipped")

    def _scalars(self, step: int, found: Mapping[str, Any]) -> dict[str, Any]:
        start, self._marks = self._marks, self._now()
        seconds = {name: now - start[name] for name, now in self._marks.items()}
        working = max(seconds["elapsed"] - sum(seconds[name] for name in NOT_TRAINING), 1e-9)
        per_second = {name: total / working for name, total in self._since.items()}
        scalars = {
            "loss": float(found["loss"]),
            "grad_norm": float(found["grad_norm"]),
            "learning_rate": self._rate(step),
            "targets": int(found["targets"]),
            "tokens": int(found["tokens"]),
            "clips": int(found["clips"]),
            "fill": int(found["tokens"]) / self._positions,
            "batch": f"{int(found['batch']):08x}",
            "targets_per_s": per_second["targets"],
            "clips_per_s": per_second["clips"],
            "data_wait": seconds["data"] / working,
            "goodput": self._watch.goodput(),
        }
        if self._peak:
            tokens, length = per_second["tokens"], self._since["tokens"] / max(self._since["clips"], 1)
            scalars["mfu_4n"] = self._cost.flops_4n(tokens) / self._peak
            scalars["mfu"] = self._cost.flops(tokens, length) / self._peak
        self._since = {}
        return scalars

    def _now(self) -> dict[str, float]:
        spent = {name: self._watch.spent[name] for name in (*NOT_TRAINING, "data")}
        return {"elapsed": self._watch.elapsed(), **spent}
