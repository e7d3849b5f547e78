"""Work done by child processes: in order, ahead of its turn, and so that a child that dies takes no other work with it.

A child is a new interpreter that imports the work by its name. Unlike those of multiprocessing it does not run the
caller's script again, so that scripts, notebooks and servers need no guard. It ends with its parent, whatever ends
this.
"""

import atexit
import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from typing import Any

POLL_S = 0.1  # between two looks whether work is still wanted
KEPT = 2  # children that wait for the next work; starting one takes about as long as reading a clip
_CHILD = """
import sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
sys.path[:] = connection.recv()
from emollama_jax.io.worker_pool import serve
serve(connection)
"""


class WorkerDied(Exception):
    """A child ended in the middle of its work.

    Attributes:
        signal: the name of the signal that ended it, such as SIGABRT; "" where it exited by itself.
    """

    def __init__(self, returncode: int):
        try:
            self.signal = signal.Signals(-returncode).name
        except ValueError:
            self.signal = ""
        super().__init__(self.signal or f"exit code {returncode}")


class WorkerStopped(WorkerDied):
    """A child was ended because its work took too long, or is no longer wanted."""

    def __init__(self, reason: str):
        self.signal = "SIGKILL"
        Exception.__init__(self, reason)


def default_workers() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_ahead(work: Callable[[Any], Any], jobs: Iterable[Any], workers: int, ahead: int | None = None) -> Iterator[Any]:
    """`work` of each job, in their order, by processes that run ahead a little: results never pile up.

    A job whose process dies, of a fault in a decoder or for want of memory, gives a `WorkerDied` as its result.

    Args:
        work: is pickled; a function of a module, or a partial of one.
        workers: processes; 0 works in this one.
        ahead: jobs that are done or under way before their turn; two a worker by default.
    """
    ahead = 2 * workers if ahead is None else ahead
    if workers == 0:
        yield from map(work, jobs)
        return
    pool, waiting, jobs = ThreadPoolExecutor(workers), deque(), iter(jobs)
    try:
        while True:
            while len(waiting) < ahead and (job := next(jobs, waiting)) is not waiting:
                with interrupts_deferred():
                    waiting.append(pool.submit(_run_or_died, work, job))
            if not waiting:
                return
            yield _result(waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def run_apart(
    work: Callable[[Any], Any],
    job: Any,
    *,
    timeout_s: float | int | None = None,
    is_cancelled: Callable[[], bool] | None = None,
) -> Any:
    """`work(job)`, by a child process, in the folder that is the current one now. What the work raises is raised here.

    Args:
        timeout_s: after which the child is ended; None waits for ever.
        is_cancelled: is called now and then; once it gives True the child is ended.

    Raises:
        WorkerStopped: the time was over, or the work was cancelled.
        WorkerDied: the job ended the child. A child that has worked before may have been damaged then: the job is tried
            again by a new one.
    """
    try:
        child = _idle.pop()
    except IndexError:
        child = _Child()
    while True:
        try:
            done, result = child.run(work, job, timeout_s, is_cancelled)
            break
        except WorkerDied as error:
            if child.jobs == 1 or isinstance(error, WorkerStopped):
                raise
            child = _Child()
    if len(_idle) < KEPT:
        _idle.append(child)
    else:
        child.close()
    if not done:
        raise result
    return result


def _run_or_died(work: Callable[[Any], Any], job: Any) -> Any:
    try:
        return run_apart(work, job)
    except WorkerDied as error:
        return error


class _Child:
    """A child process. Attribute `jobs`: how many it was given."""

    def __init__(self):
        self.jobs = 0
        self._connection, theirs = multiprocessing.Pipe()
        command = [sys.executable, "-c", _CHILD, str(theirs.fileno())]
        with theirs, interrupts_deferred():  # interrupts are the parent's
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._connection.send(sys.path)

    def run(
        self,
        work: Callable[[Any], Any],
        job: Any,
        timeout_s: float | int | None = None,
        is_cancelled: Callable[[], bool] | None = None,
    ) -> tuple[bool, Any]:
        """Whether the work was done, and its result or what it raised. Raises WorkerDied."""
        self.jobs += 1
        message = pickle.dumps((_current_folder(), work, job))
        try:
            self._connection.send_bytes(message)
            if timeout_s is not None or is_cancelled is not None:
                self._wait(timeout_s, is_cancelled)
            return pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            self._connection.close()
            raise WorkerDied(self._process.wait()) from None

    def _wait(self, timeout_s: float | int | None, is_cancelled: Callable[[], bool] | None) -> None:
        """Wait for the result. Raises WorkerStopped, with the child ended."""
        end = time.monotonic() + (float("inf") if timeout_s is None else timeout_s)
        while not self._connection.poll(max(0.0, min(POLL_S, end - time.monotonic()))):
            reason = "cancelled" if is_cancelled is not None and is_cancelled() else ""
            reason = reason or (f"it took more than {timeout_s:g} s" if time.monotonic() >= end else "")
            if reason:
                self._process.kill()
                self.close()
                raise WorkerStopped(reason)

    def close(self) -> None:
        self._connection.close()
        self._process.wait()


_idle: deque[_Child] = deque()


@atexit.register
def close_idle() -> None:
    """End the children that wait for work: their memory is free then, and their time part of `os.times`."""
    while _idle:
        _idle.pop().close()


def _current_folder() -> str | None:
    """None where it has been removed."""
    with contextlib.suppress(FileNotFoundError):
        return os.getcwd()


def serve(connection: Connection) -> None:
    """Do the work that comes in, up to the end of the parent: what a child runs."""
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            folder, work, job = pickle.loads(message)
            if folder not in (None, _current_folder()):
                os.chdir(folder)  # relative paths mean what they mean to the parent
            answer = pickle.dumps((True, work(job)))
        except Exception as error:
            answer = pickle.dumps((False, error))
        connection.send_bytes(answer)


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """An interrupt (SIGINT) or SIGTERM inside the block is handled at its end: inside a pool's own code an exception of
    its handler can leave a lock closed that the pool's other thread then waits for, without end. Processes that begin
    in the block know no interrupts."""
    seen: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():  # only it is interrupted
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not None:  # a handler that is not Python's could not be put back
                before[number] = signal.signal(number, lambda number, frame: seen.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in seen:
            signal.raise_signal(number)


def _result(future: Future) -> Any:
    """What comes of it; an interrupt ends the waiting within a tenth of a second."""
    while not future.done():
        with interrupts_deferred():
            wait([future], timeout=0.1)
    with interrupts_deferred():
        return future.result()
