"""How many processes share the work on a data set, and work handed to them in order."""

import multiprocessing
import os
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
    pool, waiting, jobs = _pool(workers), deque(), iter(jobs)

    def submit(job: Any) -> Future:
        nonlocal pool
        try:
            return pool.submit(work, job)
        except BrokenProcessPool:
            pool.shutdown()
            pool = _pool(workers)
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


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))  # a forked JAX can deadlock


def _alone(work: Callable[[Any], Any], job: Any) -> Any:
    with _pool(1) as pool:
        try:
            return pool.submit(work, job).result()
        except BrokenProcessPool as error:
            return error
