"""Estimate memory and speed on TPUs and GPUs without having them."""

import argparse
import os
import sys
from pathlib import Path

from emollama_jax.cli._arguments import VerbParser, add_config_argument, at_least, parse
from emollama_jax.io.paths import local_path
from emollama_jax.plan.compiler import Compiler
from emollama_jax.plan.overlay import overlay
from emollama_jax.plan.plan import assumptions, make_plan
from emollama_jax.plan.programs import PROGRAMS
from emollama_jax.plan.search import ranking_table, save_ranking, search
from emollama_jax.plan.topology import CHIPS, parse_topology

CACHE = "~/.cache/emollama_jax/plans"


def run(argv: list[str]) -> int:
    config, arguments = parse(make_parser(), argv)
    topology = parse_topology(arguments.topology)
    for file in (arguments.json, arguments.overlay):
        if file:
            file.touch()  # an unwritable place is better known before the work than after
    cache = None if arguments.no_cache else Path(CACHE).expanduser()
    compiler = Compiler(cache, arguments.processes)
    if arguments.time_limit:
        compiler = compiler.within(60.0 * arguments.time_limit)
    base = _base(argv)
    name = Path(base).stem
    if not arguments.search:
        plan = make_plan(
            name, config, topology, compiler, arguments.programs, with_largest=not arguments.without_largest
        )
        print(plan)
        if arguments.json:
            plan.save(arguments.json)
        return 0 if plan.fits else 1
    log = lambda line: print(line, file=sys.stderr, flush=True)
    found = search(config, topology, compiler, log)
    print(f"{name} on {topology.name}: compiler estimates, the best first; nothing has been measured")
    print("\n".join([*ranking_table(found), "", *(f"- {line}" for line in assumptions(topology))]))
    if arguments.json:
        save_ranking(arguments.json, name, found)
    if arguments.overlay:
        arguments.overlay.write_text(overlay(arguments.overlay, base, found[0]), encoding="utf-8")
    return 0 if found[0].fits else 1


def _base(argv: list[str]) -> str:
    """The experiment's name or path, as it was given."""
    at = next(i for i, argument in enumerate(argv) if argument.partition("=")[0] == "--config")
    return argv[at].partition("=")[2] or argv[at + 1]


def make_parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog="emollama plan",
        description="Compiles an experiment's own programs for TPUs or GPUs without the hardware and prints the memory "
        "they take, what they send to each other and how long they take at best: compiler estimates, never "
        "measurements. Exits with 1 where a program does not fit. For TPUs it needs the extra plan, for GPUs cuda.",
        epilog="example: emollama plan --config stage1_merr --topology v5e-16",
    )
    add_config_argument(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help=f"as clouds call it: KIND-NUMBER, KIND one of {', '.join(CHIPS)}; 2xv5e-16 is two slices",
    )
    parser.add_argument(
        "--programs", nargs="+", choices=PROGRAMS, default=["step"], metavar="P", help=f"of {', '.join(PROGRAMS)}"
    )
    parser.add_argument("--without-largest", action="store_true", help="leave out the largest batch: one compile less")
    parser.add_argument(
        "--search", action="store_true", help="try meshes, rows and kernels for the step, and rank them"
    )
    parser.add_argument(
        "--overlay", type=local_path, metavar="FILE.py", help="with --search: write the best as a config"
    )
    parser.add_argument(
        "--json", type=local_path, metavar="FILE", help="also write the plan, or the ranking, to a file"
    )
    parser.add_argument(
        "--time-limit", type=at_least(1), metavar="MINUTES", help="begin no compile after it (default: none)"
    )
    parser.add_argument(
        "--processes",
        type=at_least(1),
        default=max(1, (os.cpu_count() or 1) // 2),
        metavar="N",
        help="compiles at a time, of about 3 GiB each (default: half the processors)",
    )
    parser.add_argument("--no-cache", action="store_true", help=f"compile all anew, and keep nothing in {CACHE}")
    return parser
