"""What a run of the tests left out."""

from collections import Counter
from collections.abc import Iterable


def left_out(reasons: Iterable[str], *, slow: bool) -> str:
    """Which tests a run left out and why, in a line; "" for none.

    Args:
        reasons: of each skipped test.
        slow: whether slow tests were not selected.
    """
    counts = Counter(reason.removeprefix("Skipped: ") for reason in reasons)
    parts = ["slow tests (bash launch/test.sh --all runs them)"] if slow else []
    parts += [f"{count} skipped: {reason}" for reason, count in counts.most_common()]
    return f"left out: {'; '.join(parts)}" if parts else ""
