"""Work handed to processes: in order, never piling up, and one that dies takes no other with it."""

import os
import signal
import threading
import time
from concurrent.futures.process import BrokenProcessPool

import pytest

from emollama_jax.io.worker_pool import default_workers, interrupts_deferred, map_ahead


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


def blocked(_) -> set[signal.Signals]:
    return signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_processes_leave_interrupts_to_their_parent():
    here = blocked(None)
    assert all(signal.SIGINT in mask for mask in map_ahead(blocked, range(4), 2))
    assert blocked(None) == here and signal.SIGINT not in here


def test_an_interrupt_comes_after_what_it_would_break():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_deferred():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        done.append(True)
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_is_waited_through_ends_the_run():
    results = map_ahead(time.sleep, [0, 0.5, 0.5, 0.5], 1)
    next(results)
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        next(results)
    assert list(results) == []


def test_in_other_threads_interrupts_are_left_alone():
    results = []
    thread = threading.Thread(target=lambda: results.extend(map_ahead(double, range(3), 1)))
    thread.start()
    thread.join(60)
    assert results == [0, 2, 4]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
