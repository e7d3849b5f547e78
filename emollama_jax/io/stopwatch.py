"""Where the time goes."""

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Adds up the seconds that each kind of work takes.

    Attributes:
        seconds: by kind, in the order in which they were first measured.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def add(self, kind: str, seconds: float) -> None:
        self.seconds[kind] = self.seconds.get(kind, 0) + seconds

    @contextlib.contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """Measure the block."""
        start = time.perf_counter()
        yield
        self.add(kind, time.perf_counter() - start)
