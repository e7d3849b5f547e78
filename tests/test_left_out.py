"""The last line of a run of the tests, and the order in which they run."""

from tests.left_out import left_out, slow_first


def test_reasons_are_counted():
    assert left_out([]) == ""
    slow = "2 slow (bash launch/test.sh --all runs them)"
    assert left_out([], slow=2) == f"not run: {slow}"
    reasons = ["Skipped: no torch", "Skipped: no bucket", "no bucket"]
    assert left_out(reasons) == "not run: 2 no bucket, 1 no torch"
    assert left_out(reasons[:1], slow=2, others=3) == f"not run: {slow}, 1 no torch, 3 not selected"


def test_every_process_begins_with_slow_tests():
    slow, quick = [["a1", "a2", "a3"], ["b"], ["c"]], list("uvwxy")
    assert slow_first(slow, quick, 1) == ["a1", "a2", "a3", "b", "c", *"uvwxy"]
    assert slow_first(slow, quick, 2) == ["a1", "a2", "a3", "c", "u", "b", *"vwxy"]
    assert slow_first([], quick, 2) == quick
