"""What the threads of libraries report of a full disk."""

import errno
import subprocess
import sys
import threading
import types

import pytest
from absl import logging

from emollama_jax import cli

FULL = OSError(errno.ENOSPC, "No space left on device")
LATE = RuntimeError("Event loop is closed")
SCRIPT = """
import sys, threading, time, types
from absl import logging
from emollama_jax import cli
from tests.cli.test_background import FULL, fail

def late():
    threading.main_thread().join()
    fail(FULL)

def run(argv):
    threading.Thread(target=late).start()
    raise FULL

sys.modules["emollama_jax.cli.params"] = types.SimpleNamespace(run=run)
sys.argv = ["emollama", "params", *sys.argv[1:]]
sys.exit(cli.main())
"""


def fail(error: Exception) -> None:
    """Fails as threads of libraries do that write: logs it, cannot raise it to anyone, and ends by it."""

    class Held:
        def __del__(self):
            raise error

    try:
        raise error
    except Exception:
        logging.exception("failed to write")
        Held()
        raise


@pytest.fixture
def shown(monkeypatch, capfd, caplog):
    """Runs a verb with a thread that fails by an error, which then ends itself by another or by none; gives
    its standard error, and what was logged."""

    def run_verb(error, end, *flags):
        def run(argv):
            thread = threading.Thread(target=fail, args=[error])
            thread.start()
            thread.join()
            if end is not None:
                raise end

        monkeypatch.setitem(sys.modules, "emollama_jax.cli.params", types.SimpleNamespace(run=run))
        monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # in place of pytest's
        monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
        hooks = threading.excepthook, sys.unraisablehook
        assert cli.main(["params", *flags]) == (2 if end else 0)
        assert (threading.excepthook, sys.unraisablehook) == hooks and not logging.get_absl_logger().filters
        return capfd.readouterr().err, caplog.text

    return run_verb


@pytest.mark.parametrize("error", [FULL, ValueError("RESOURCE_EXHAUSTED: OS error 28: No space left on device"), LATE])
def test_a_full_disk_is_one_line_whatever_threads_meet_it(shown, error):
    line = (
        "emollama params: error: cannot write: [Errno 28] No space left on device; make room there, or choose another "
    )
    assert shown(error, FULL) == (f"{line}place\n", "")


@pytest.mark.smoke
def test_threads_that_outlive_the_verb_are_as_quiet():
    run = lambda *flags: subprocess.run([sys.executable, "-c", SCRIPT, *flags], capture_output=True, text=True)
    done = run()
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot write" in done.stderr, done.stderr
    assert "Traceback" in run("--debug").stderr


def test_what_ends_in_no_error_is_still_reported(shown):
    """And all of it is, with its traceback, where the verb is asked for it."""
    for report, logged in (shown(FULL, None), shown(FULL, FULL, "--debug")):
        assert report.count("No space left on device") >= 2 and "Traceback" in report and "failed to write" in logged


def test_defects_of_threads_are_reported(shown):
    report, logged = shown(ValueError("what"), FULL)
    assert report.count("ValueError: what") == 2 and "failed to write" in logged
    assert report.splitlines()[-1].startswith("emollama params: error: cannot write")
