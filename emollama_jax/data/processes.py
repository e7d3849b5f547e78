"""How many processes share the work on a data set, and work handed to them in order."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any


def default_workers() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_ahead(work: Callable[[Any], Any], jobs: Iterable[Any], workers: int, ahead: int | None = None) -> Iterator[Any]:
    """`work` of each job, in their order, by processes that run ahead a little: results never pile up.

    A job whose process dies, of a fault in a decoder or for want of memory, gives a `BrokenProcessPool` as its result,
    and the others are done all the same.

    Args:
        workers: processes; 0 works in this one.
        ahead: jobs that are done or under way before their turn; two a worker by default.
    """
    ahead = 2 * workers if ahead is None else ahead
    if workers == 0:
        yield from map(work, jobs)
        return
    pool, waiting, jobs = process_pool(workers), deque(), iter(jobs)

    def submit(job: Any) -> Future:
        nonlocal pool
        try:
            return pool.submit(work, job)
        except BrokenProcessPool:
            pool.shutdown()
            pool = process_pool(workers)
            return pool.submit(work, job)

    try:
        while True:
            while len(waiting) < ahead and (job := next(jobs, waiting)) is not waiting:
                waiting.append((job, submit(job)))
            if not waiting:
                return
            job, future = waiting.popleft()
            try:
                result = future.result()
            except BrokenProcessPool:  # it or one beside it: that is seen when each is tried by itself
                result = _alone(work, job)
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def process_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that are spawned, as a forked JAX can deadlock, and that leave an interrupt to this one."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))


def _alone(work: Callable[[Any], Any], job: Any) -> Any:
    with process_pool(1) as pool:
        try:
            return pool.submit(work, job).result()
        except BrokenProcessPool as error:
            return error
