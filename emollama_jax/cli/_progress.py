"""How far long work is: a bar on a terminal, now and then a line elsewhere."""

import sys
import time

from tqdm import tqdm

EVERY_S = 30.0  # between two lines


class Progress:
    """Counts what is done of `total`, with the rate and the time left, on standard error."""

    def __init__(self, total: int, unit: str):
        self._bar = tqdm(total=total, unit=unit) if sys.stderr.isatty() else None
        self._total, self._unit, self._done = total, unit, 0
        self._start = self._told = time.monotonic()

    def __call__(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif (now := time.monotonic()) - self._told >= EVERY_S:
            self._told, rate = now, self._done / (now - self._start)
            left = (self._total - self._done) / rate
            print(f"{self._done:,} of {self._total:,} {self._unit}s, {rate:.2f}/s, {left:.0f} s left", file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
