"""Work handed to processes: in order, never piling up, and one that dies takes no other with it."""

import os
import time
from concurrent.futures.process import BrokenProcessPool

import pytest

from emollama_jax.data.processes import default_workers, map_ahead


def double(number: int) -> int:
    if number == 13:
        os._exit(1)  # as a fault in a decoder ends its process
    if number < 0:
        raise ValueError(number)
    return 2 * number


def test_there_is_a_processor():
    assert default_workers() >= 1


@pytest.mark.parametrize(("workers", "ahead", "most"), [(0, None, 1), (2, None, 4), (1, 6, 6)])
def test_results_come_in_order_and_jobs_are_taken_when_needed(workers, ahead, most):
    taken = []
    jobs = (taken.append(i) or i for i in range(12))
    results = map_ahead(double, jobs, workers, ahead)
    assert next(results) == 0
    time.sleep(0.05)
    assert len(taken) == most
    assert list(results) == [2 * i for i in range(1, 12)]
    assert list(map_ahead(double, [], workers)) == []


def test_a_job_whose_process_dies_is_told_and_the_others_are_done():
    results = list(map_ahead(double, [1, 2, 13, 3, 4, 13, 5], 2))
    assert [isinstance(result, BrokenProcessPool) for result in results] == [i in (2, 5) for i in range(7)]
    assert [result for result in results if isinstance(result, int)] == [2, 4, 6, 8, 10]


def test_what_the_work_raises_is_raised():
    with pytest.raises(ValueError, match="-1"):
        list(map_ahead(double, [1, -1, 2], 2))
