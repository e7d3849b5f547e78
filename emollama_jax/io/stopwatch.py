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
        self._start = time.monotonic()
        self.seconds: dict[str, float] = {}

    def add(self, kind: str, seconds: float) -> None:
        self.seconds[kind] = self.seconds.get(kind, 0) + seconds

    @contextlib.contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """Measure the block."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(kind, time.monotonic() - start)

    def elapsed(self) -> float:
        """Seconds since the watch was made."""
        return time.monotonic() - self._start

    def rest_share(self) -> float:
        """The share of these that none of the measured kinds took."""
        return 1 - sum(self.seconds.values()) / max(self.elapsed(), 1e-9)
