"""The command `emollama` beside a notebook: where it is, and what happens when it fails."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from emollama_jax.errors import UserError


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
