"""Runs `emollama serve` for the tests of its process; `dies` has the engine fail at its third chunk of tokens.

python -m tests.serve.process lives|dies ARGUMENTS
"""

import sys

from emollama_jax import cli
from emollama_jax.infer.slots import SlotBatcher


def break_after(steps: int) -> None:
    """Have every batcher fail once it has decoded so many chunks."""
    real, done = SlotBatcher.step, []

    def step(self):
        done.append(None)
        if len(done) > steps:
            raise RuntimeError("the device is lost")
        return real(self)

    SlotBatcher.step = step


if __name__ == "__main__":
    if sys.argv[1] == "dies":
        break_after(2)
    sys.exit(cli.main(["serve", *sys.argv[2:]]))
