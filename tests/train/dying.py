"""`emollama train` that dies: python -m tests.train.dying HOW STEP ARGUMENT...

step       as that step has been given to the devices
saving     as its checkpoint is being written
unsealed   as its checkpoint is in place, without the list of its files
term       SIGTERM to itself, as that step has been given to the devices
never      not at all


Torch cannot be imported: training never needs it.
"""

import os
import signal
import sys

from emollama_jax.cli import main
from emollama_jax.runs import checkpoints
from emollama_jax.train import report


def die(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def arrange(how: str, step: int) -> None:
    """Puts the end of this process where it is to be."""
    if how in ("step", "term"):
        add = report.Report.add

        def add_and_die(self, number, values):
            if number == step:
                die(signal.SIGKILL if how == "step" else signal.SIGTERM)
            return add(self, number, values)

        report.Report.add = add_and_die
    elif how == "saving":
        save = checkpoints.Checkpoints.save

        def save_and_die(self, number, *args, **kwargs):
            save(self, number, *args, **kwargs)
            if number == step:
                die()

        checkpoints.Checkpoints.save = save_and_die
    elif how == "unsealed":
        write = checkpoints.write_file_list

        def write_or_die(folder):
            if folder.name == str(step):
                die()
            write(folder)

        checkpoints.write_file_list = write_or_die


if __name__ == "__main__":
    sys.modules["torch"] = None
    arrange(sys.argv[1], int(sys.argv[2]))
    sys.exit(main(["train", *sys.argv[3:]]))
