"""Work handed to processes: in order, never piling up, and one that dies takes no other with it."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from emollama_jax.io.worker_pool import (
    WorkerDied,
    WorkerStopped,
    default_workers,
    interrupts_deferred,
    map_ahead,
    run_apart,
)

damaged = False


def double(number: int) -> int:
    if number == 13 or damaged:
        os.kill(os.getpid(), signal.SIGABRT)  # as a fault in a decoder ends its process
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
    assert [isinstance(result, WorkerDied) for result in results] == [i in (2, 5) for i in range(7)]
    assert results[2].signal == str(results[2]) == "SIGABRT"
    assert [result for result in results if isinstance(result, int)] == [2, 4, 6, 8, 10]


def damage(_) -> None:
    global damaged
    damaged = True


def test_what_a_job_left_broken_is_not_laid_to_the_next():
    run_apart(damage, None)
    assert run_apart(double, 2) == 4


def test_a_job_that_exits_is_told():
    with pytest.raises(WorkerDied, match="^exit code 3$") as caught:
        run_apart(os._exit, 3)
    assert caught.value.signal == ""


def test_a_script_is_not_run_again_by_its_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from emollama_jax.io.worker_pool import map_ahead\nprint('begun', *map_ahead(abs, [-1, 2], 1))")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."})
    assert (run.stdout, run.stderr) == ("begun 1 2\n", "")


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


def test_sigterm_too():
    def end(number, frame):
        raise SystemExit(number)

    before, done = signal.signal(signal.SIGTERM, end), []
    try:
        with pytest.raises(SystemExit), interrupts_deferred():
            signal.raise_signal(signal.SIGTERM)
            done.append(True)
        assert done and signal.getsignal(signal.SIGTERM) is end
    finally:
        signal.signal(signal.SIGTERM, before)


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


def test_paths_mean_what_they_mean_to_the_caller(tmp_path, monkeypatch):
    """A child that has worked before works in the folder that is the current one now."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert run_apart(os.path.abspath, "clip.mp4") == str(tmp_path / name / "clip.mp4")


def test_a_job_that_takes_too_long_or_is_not_wanted_any_more_is_ended():
    with pytest.raises(WorkerStopped, match=r"^it took more than 0\.2 s$") as caught:
        run_apart(time.sleep, 60, timeout_s=0.2)
    assert isinstance(caught.value, WorkerDied) and caught.value.signal == "SIGKILL"
    with pytest.raises(WorkerStopped, match="^cancelled$"):
        run_apart(time.sleep, 60, is_cancelled=lambda: True)
    assert run_apart(double, 4, timeout_s=60, is_cancelled=lambda: False) == 8
    with pytest.raises(ValueError):
        run_apart(double, -1, timeout_s=60)
