"""How many processes share the work on a data set, and work handed to them in order."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
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
                with interrupts_deferred():
                    waiting.append((job, submit(job)))
            if not waiting:
                return
            job, future = waiting.popleft()
            try:
                result = _result(future)
            except BrokenProcessPool:  # it or one beside it: that is seen when each is tried by itself
                result = _alone(work, job)
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """An interrupt (SIGINT) inside the block is handled at its end: inside a pool's own code it can leave a lock closed
    that the pool's other thread then waits for, without end. Processes that begin in the block know no interrupts."""
    before, seen = signal.getsignal(signal.SIGINT), []
    # Only the main thread is interrupted; a handler that is not Python's could not be put back.
    interrupted = threading.current_thread() is threading.main_thread() and before is not None
    if interrupted:
        signal.signal(signal.SIGINT, lambda *_: seen.append(True))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if interrupted:
            signal.signal(signal.SIGINT, before)
            if seen:
                signal.raise_signal(signal.SIGINT)


def _result(future: Future) -> Any:
    """What comes of it; an interrupt ends the waiting within a tenth of a second."""
    while not future.done():
        with interrupts_deferred():
            wait([future], timeout=0.1)
    with interrupts_deferred():
        return future.result()


def _pool(workers: int) -> ProcessPoolExecutor:
    """Processes that are spawned, as a forked JAX can deadlock. They begin when work is handed in: leave interrupts to
    this process by doing so with `interrupts_deferred`."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))


def _alone(work: Callable[[Any], Any], job: Any) -> Any:
    with _pool(1) as pool:
        try:
            with interrupts_deferred():
                future = pool.submit(work, job)
            return _result(future)
        except BrokenProcessPool as error:
            return error
