"""Arguments that several verbs take, their types, and how a verb's command line is parsed."""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NoReturn

from emollama_jax.config import Config, parse_flags
from emollama_jax.errors import UserError
from emollama_jax.text.labels import check_labels


class VerbParser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors, which the command prints as one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists the arguments")


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str], *, default: Config | None = None
) -> tuple[Config, argparse.Namespace]:
    """Parse a verb's command line into the experiment and the other arguments; `--help` needs no experiment.

    Args:
        default: the experiment when no `--config` is given.

    Raises:
        UserError: an argument or an override is wrong, or there is no experiment.
    """
    if {"-h", "--help"} & set(argv):
        parser.parse_args(argv)  # prints the help and exits
    config, rest = parse_flags(argv, default)
    return config, parser.parse_args(rest)


def add_config_argument(parser: argparse._ActionsContainer, default: str = "") -> None:
    """Add `--config` to the help; `parse` takes it, and the overrides, before the parser sees the arguments."""
    parser.add_argument(
        "--config",
        metavar="NAME_OR_PATH",
        default=argparse.SUPPRESS,
        help=f"the experiment{f' (default: {default})' if default else ''}; --config.GROUP.FIELD=VALUE changes it",
    )


def add_process_arguments(parser: argparse._ActionsContainer) -> None:
    """Add how the processes of several hosts find each other; read by `start_processes`."""
    parser.add_argument("--pod", action="store_true", help="let JAX find the other hosts: Cloud TPU, MPI, Kubernetes")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of the first process")
    parser.add_argument("--processes", metavar="N", help="number of processes")
    parser.add_argument("--process", metavar="I", help="number of this process, from 0")
    parser.add_argument(
        "--wait",
        type=at_least(1),
        metavar="SECONDS",
        help="for the processes to come to the coordinator (default: 120)",
    )


def start_processes(arguments: argparse.Namespace) -> AbstractContextManager[None]:
    """Return the block within which this process is one of its run's; see `distributed.process_group`."""
    from emollama_jax.distributed import PATIENCE_S, find_group, process_group

    group = find_group(arguments.coordinator, arguments.processes, arguments.process, pod=arguments.pod)
    log = lambda line: print(line, file=sys.stderr, flush=True)
    return process_group(group, patience_s=arguments.wait or PATIENCE_S, log=log)


def add_label_arguments(parser: argparse._ActionsContainer, default: str) -> None:
    """Add the label set, and how numbers in a label column are read."""
    parser.add_argument("--labels", type=_labels, help=f"separated by commas ({default})")
    parser.add_argument(
        "--label-numbers",
        type=at_least(0),
        metavar="N",
        help="what number means the first label in a label column, as 1 does in DFEW's (default: a number is no label)",
    )


def _labels(text: str) -> tuple[str, ...]:
    try:
        return check_labels([label.strip() for label in text.split(",")])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def at_least(least: int) -> Callable[[str], int]:
    """Make an argument type: a whole number from `least` on."""

    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return whole_number
