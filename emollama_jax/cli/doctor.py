"""Check that every byte of runs and base checkpoints is what was written."""

import argparse

import jax
from etils import epath

from emollama_jax.cli._arguments import VerbParser
from emollama_jax.runs.doctor import examine


def run(argv: list[str]) -> int:
    arguments = make_parser().parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # nothing here needs an accelerator
    sound = True
    for path in arguments.paths:
        for finding in examine(path):
            print(finding, flush=True)
            sound = sound and not finding.problem
    return 0 if sound else 1


def make_parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog="emollama doctor",
        description="Reads every file of a run (all checkpoints, the values it does not train, and its language model "
        "where that is there), of one checkpoint, or of a base checkpoint, and compares it with what was written. "
        "Loading does so once for a file and then goes by its size and time of change. Exit code 0: all is sound, 1: "
        "it is not.",
        epilog="example: emollama doctor runs/stage2 weights/llama2",
    )
    parser.add_argument("paths", nargs="+", type=epath.Path, metavar="PATH", help="the folder of a run or checkpoint")
    return parser
