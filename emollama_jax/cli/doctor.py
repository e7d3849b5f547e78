"""Check a host or a pod before a run, or every byte of runs and base checkpoints."""

import argparse

import jax
from etils import epath

from emollama_jax.cli._arguments import VerbParser, add_config_argument, add_process_arguments, parse, start_processes
from emollama_jax.config import Config
from emollama_jax.runs.doctor import examine


def run(argv: list[str]) -> int:
    has_config = any(argument.startswith("--config") for argument in argv)
    config, arguments = parse(make_parser(), argv, default=None if has_config else Config())
    if arguments.paths:
        return _examine(arguments.paths)
    from emollama_jax.train.host_checks import check_hosts

    sound = True
    with start_processes(arguments):
        for check in check_hosts(config if has_config else None):
            if check.problem or jax.process_index() == 0:
                print(check, flush=True)
            sound = sound and not check.problem
    return 0 if sound else 1


def _examine(paths: list[epath.Path]) -> int:
    jax.config.update("jax_platforms", "cpu")  # nothing here needs an accelerator
    sound = True
    for path in paths:
        for finding in examine(path):
            print(finding, flush=True)
            sound = sound and not finding.problem
    return 0 if sound else 1


def make_parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog="emollama doctor",
        usage="emollama doctor PATH [PATH ...]\n"
        "       emollama doctor [--config NAME_OR_PATH [--config.GROUP.FIELD=VALUE ...]]\n"
        "                       [--pod | --coordinator HOST:PORT --processes N --process I [--wait SECONDS]]",
        description="With paths: reads every file of a run (all checkpoints, the values it does not train, and its\n"
        "language model where that is there), of one checkpoint, of a base checkpoint, or of a folder that emollama\n"
        "fetch made, and compares it with what was written. Loading does so once for a file and then\n"
        "goes by its size and time of change.\n\n"
        "Without: checks this host, or all hosts of a pod on each of which it is started, before a run: versions,\n"
        "devices, disk, memory, /dev/shm, clocks, and that every host has the same code and experiment; with the\n"
        "arguments of emollama train also whether the mesh and the batch fit, data and weights can be read, and the\n"
        "run's folder is written and shared. A line each.\n\n"
        "Exit code 0: all is sound, 1: it is not, 3: the processes did not meet, or there are no devices.",
        epilog="example: emollama doctor runs/stage2 weights/llama2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="*", type=epath.Path, metavar="PATH", help="the folder of a run or checkpoint")
    add_config_argument(parser)
    add_process_arguments(parser)
    return parser
