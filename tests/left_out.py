"""What a run of the tests left out, and the order in which it takes the slow ones."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, islice


def left_out(reasons: Iterable[str], *, slow: int = 0, others: int = 0) -> str:
    """Which tests a run left out and why, in a line; "" for none.

    Args:
        reasons: of each skipped test; as a rule they say what makes it run.
        slow: slow tests that were not selected.
        others: tests that -k, -m or --deselect left out.
    """
    counts = Counter(reason.removeprefix("Skipped: ") for reason in reasons)
    parts = [f"{slow} slow (bash launch/test.sh --all runs them)"] if slow else []
    parts += [f"{count} {reason}" for reason, count in counts.most_common()]
    parts += [f"{others} not selected"] if others else []
    return f"not run: {', '.join(parts)}" if parts else ""


def slow_first(slow: Sequence[list], quick: list, processes: int) -> list:
    """The order of tests in which each process of xdist starts with slow ones, so that none is left for the end.

    Args:
        slow: the slow tests of each file; they share fixtures and stay together.
        quick: all other tests.
        processes: that begin with equal slices of the order; one that is done takes from the end of another's.
    """
    order, rest = [], iter(quick)
    total = len(quick) + sum(map(len, slow))
    for k in range(processes):
        order += chain(*slow[k::processes])
        order += islice(rest, max(0, total * (k + 1) // processes - len(order)))
    return order
