"""Arguments that several verbs take, and their types."""

import argparse
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """A whole number from `least` on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return parse


def add_group_arguments(parser: argparse.ArgumentParser) -> None:
    """How the processes of several hosts find each other; read by `train.distributed.find_group`."""
    parser.add_argument("--pod", action="store_true", help="let JAX find the other hosts: Cloud TPU, MPI, Kubernetes")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="the first process's address")
    parser.add_argument("--processes", metavar="N", help="how many processes there are")
    parser.add_argument("--process", metavar="I", help="which this one is, from 0")
