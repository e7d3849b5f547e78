"""The last line of a run of the tests."""

import pytest

from tests.left_out import left_out

pytestmark = pytest.mark.smoke


def test_reasons_are_counted():
    assert left_out([], slow=False) == ""
    slow = "slow tests (bash launch/test.sh --all runs them)"
    assert left_out([], slow=True) == f"left out: {slow}"
    reasons = ["Skipped: no torch", "Skipped: no bucket", "no bucket"]
    assert left_out(reasons, slow=False) == "left out: 2 skipped: no bucket; 1 skipped: no torch"
    assert left_out(reasons[:1], slow=True) == f"left out: {slow}; 1 skipped: no torch"
