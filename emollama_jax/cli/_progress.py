"""How far long work is: a bar on a terminal, now and then a line elsewhere."""

import sys
import time

from tqdm import tqdm

EVERY_S = 30.0  # between two lines


class Progress:
    """Counts what is done of `total`, with the rate and the time left, on standard error.

    Bytes, which are the unit "B", are told in kB, MB and GB. `what` is being done, where a command does several things.
    """

    def __init__(self, total: int, unit: str, what: str = ""):
        scaled = unit == "B"
        self._bar = tqdm(total=total, desc=what, unit=unit, unit_scale=scaled) if sys.stderr.isatty() else None
        self._what = f"{what}: " if what else ""
        self._told_as = lambda count: f"{tqdm.format_sizeof(count)}B" if scaled else f"{count:,} {unit}s"
        self._total, self._done = total, 0
        self._start = self._told = time.monotonic()

    def __call__(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif (now := time.monotonic()) - self._told >= EVERY_S:
            self._told, rate = now, self._done / (now - self._start)
            left = max(0, self._total - self._done) / max(rate, 1e-9)
            done, total = self._told_as(self._done), self._told_as(self._total)
            print(
                f"{self._what}{done} of {total}, {self._told_as(round(rate, 2))} a second, {left:.0f} s left",
                file=sys.stderr,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
