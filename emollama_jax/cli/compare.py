"""Compare two sets of features, and say whether they can be mixed."""

import argparse

from etils import epath

from emollama_jax.cli._arguments import VerbParser
from emollama_jax.features.compare import INTERCHANGEABLE, SAME, compare
from emollama_jax.io.atomic import write_json


def run(argv: list[str]) -> int:
    arguments = make_parser().parse_args(argv)
    comparison = compare(arguments.a, arguments.b)
    print(comparison)
    if arguments.json:
        write_json(arguments.json, comparison.to_dict())
    return 0 if comparison.verdict in (SAME, INTERCHANGEABLE) else 1


def make_parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog="emollama compare",
        description="Compares two sets of features clip by clip: FOLDER or FOLDER:SPLIT of records, or a folder of "
        ".npy files. Exit code 0: they can be mixed, 1: they cannot.",
        epilog="example: emollama compare data/clips/frame/1.0.0 their_features",
    )
    parser.add_argument("a", metavar="A", help="a set of features")
    parser.add_argument("b", metavar="B", help="another, of clips of the same names")
    parser.add_argument("--json", type=epath.Path, metavar="FILE", help="the figures for programs")
    return parser
