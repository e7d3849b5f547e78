"""A run's heartbeat: a small file, also in a bucket, that tells whoever watches from outside how far the run is."""

import json
import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from emollama_jax.io.atomic import write_text

EVERY_S = 10.0  # at least, between two writes

_log = logging.getLogger(__name__).warning


class Heartbeat:
    """One line of JSON in a file that is written over again: `step`, `steps` (where the run ends), `time` (Unix
    seconds), `tokens_per_s` and `left_s` (null until they are known).

    It is a `train.metrics.Writer`. A thread writes, so that no step waits for a bucket; a write that fails is logged,
    and the next one makes up for it.
    """

    def __init__(self, path: epath.Path, steps: int, *, after: int, every_s: int | float = EVERY_S):
        """`after` is the step that the run goes on from."""
        self._path, self._steps, self._every_s = path, steps, every_s
        self._first: tuple[int, float] | None = None
        self._tokens_per_s: float | None = None
        self._next: dict[str, Any] | None = None
        self._closing, self._changed = threading.Event(), threading.Event()
        self._beat(after)
        self._thread = threading.Thread(target=self._write_all, name="heartbeat", daemon=True)
        self._thread.start()

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        if "loss" in scalars:
            self._tokens_per_s = scalars.get("tokens_per_s")
        self._beat(step)

    def flush(self) -> None:
        """Does nothing: a heartbeat is late by at most `every_s`."""

    def close(self) -> None:
        self._closing.set()
        self._changed.set()
        self._thread.join()

    def _beat(self, step: int) -> None:
        now = time.monotonic()
        left = None
        if self._first and step > self._first[0]:
            left = (now - self._first[1]) / (step - self._first[0]) * (self._steps - step)
        elif self._tokens_per_s is not None:  # the first step compiled: the rate is that of those after it
            self._first = (step, now)
        self._next = {
            "step": step,
            "steps": self._steps,
            "time": round(time.time(), 1),
            "tokens_per_s": self._tokens_per_s,
            "left_s": left,
        }
        self._changed.set()

    def _write_all(self) -> None:
        closing = False
        while not closing:
            self._changed.wait()
            self._changed.clear()
            closing = self._closing.is_set()
            try:
                write_text(self._path, json.dumps(self._next) + "\n")
            except Exception as error:  # whatever the bucket's client raises, the run goes on
                _log(f"the heartbeat was not written: {self._path}: {error}")
            self._closing.wait(self._every_s)
