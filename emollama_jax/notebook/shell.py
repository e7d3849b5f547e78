"""The command `emollama` beside a notebook: where it is, how it is run, and what happens when it fails."""

import atexit
import shlex
import shutil
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from emollama_jax.errors import UserError

Log = Callable[[str], None]
KEPT = 20  # last lines of a command that an error may show
ERROR = ": error: "  # in the line in which a command says what is wrong


def find_python() -> str:
    """Return the interpreter of the environment in which `emollama` is installed.

    Raises:
        UserError: there is no `emollama` on the PATH.
    """
    command = shutil.which("emollama")
    if command is None:
        raise UserError("no emollama on the PATH; install it, and put the environment's bin first on the PATH")
    python = Path(command).with_name("python")
    return str(python) if python.exists() else sys.executable


class Command:
    """A command under way, with its output, errors included, as lines.

    Args:
        arguments: behind the interpreter of `emollama`, as in `["-m", "emollama_jax", "train"]`.
        folder: where it runs.
        log: is told each line.
    """

    def __init__(self, arguments: Sequence[str], *, folder: str | Path | None = None, log: Log = lambda line: None):
        self.lines: deque[str] = deque(maxlen=KEPT)
        """The last ones."""
        self._log, self._line, self._ended = log, threading.Condition(), False
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        options["start_new_session"] = True  # the notebook's stop button reaches it once, through `stop`
        self.process = subprocess.Popen([find_python(), *arguments], cwd=folder, **options)
        atexit.register(self.process.terminate)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for its end, at most so long; return whether it has ended and all its lines are there."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        self._reader.join()
        return True

    def wait_for(self, start: str) -> str | None:
        """Wait for a line that begins so, and return its rest; None where the command ends before."""
        with self._line:
            while True:
                if found := [line for line in self.lines if line.startswith(start)]:
                    return found[0].removeprefix(start)
                if self._ended:
                    return None
                self._line.wait()

    def stop(self) -> None:
        """Ask it to end, and wait for that."""
        if self.process.poll() is None:
            self.process.terminate()
        self.wait()

    def error(self, what: str) -> UserError:
        """Return the error of a command that has ended, in its own words."""
        said = [line for line in self.lines if ERROR in line] or list(self.lines)
        return UserError(f"{what}: {said[-1] if said else f'exit code {self.process.returncode}'}")

    def _read(self) -> None:
        for line in self.process.stdout:
            with self._line:
                self.lines.append(line.rstrip())
                self._line.notify_all()
            self._log(line.rstrip())
        with self._line:
            self._ended = True
            self._line.notify_all()


def run(command: str, *, folder: str | Path | None = None, log: Log = print) -> None:
    """Run a command of `python`, that of `emollama`, and tell its lines.

    Example:
        run("-m emollama_jax convert smollm2.gguf weights/smollm2 --dtype float32")

    Raises:
        UserError: it failed.
    """
    running = Command(shlex.split(command), folder=folder, log=log)
    try:
        running.wait()
    except BaseException:  # the notebook's stop button
        running.stop()
        raise
    if running.process.returncode:
        raise running.error(f"python {command.split('--', 1)[0].strip()} failed")


def stop_on_errors() -> None:
    """Have a cell that runs `!command` end with an error where the command fails, and `Run all` end there with it."""
    from IPython import get_ipython

    shell = get_ipython()
    if not isinstance(shell.system, StrictSystem):
        shell.system = StrictSystem(shell.system, shell.user_ns)


class StrictSystem:
    """IPython's `system`, which raises where the command's exit code is not 0.

    Args:
        run: the shell's own, which leaves the exit code in `_exit_code`.
        names: of the notebook.
    """

    def __init__(self, run: Callable[[str], None], names: dict):
        self._run, self._names = run, names

    def __call__(self, command: str) -> None:
        """Raises UserError with the exit code."""
        self._names["_exit_code"] = 0
        self._run(command)
        if code := self._names["_exit_code"]:
            raise UserError(f"exit code {code}: {command.strip()}; what it said stands above")
