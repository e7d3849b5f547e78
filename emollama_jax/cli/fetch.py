"""Fetch the weights of the real model."""

import argparse
import contextlib
import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from tqdm import tqdm

from emollama_jax.cli._arguments import VerbParser
from emollama_jax.cli._progress import Progress
from emollama_jax.errors import UserError, as_user_error
from emollama_jax.io.hub import GO_ON
from emollama_jax.io.paths import local_path
from emollama_jax.io.text_table import align
from emollama_jax.weights.catalogue import BASE, CATALOGUE, LANGUAGE_MODEL
from emollama_jax.weights.fetch import convert_language_model, fetch, is_converted, plan_fetch, state_of

ALL = "all"


def run(argv: list[str]) -> int:
    arguments = make_parser().parse_args(argv)
    root, convert = arguments.to, arguments.convert
    if arguments.list:
        print("\n".join(_table(root)))
        return 0
    names = _names(arguments)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it tries again is not told
    there = {name for name in names if state_of(CATALOGUE[name], root) == "there"}
    by_hand = [name for name in names if name not in there and CATALOGUE[name].page]
    if convert and is_converted(root, convert):
        print(f"there   {root / BASE}")
        names.remove(LANGUAGE_MODEL)
        there.discard(LANGUAGE_MODEL)
        convert = None
    for name in sorted(there, key=names.index):
        print(f"there   {root / CATALOGUE[name].target}")
    fetched = _fetch_all([name for name in names if name not in there and name not in by_hand], root)
    if convert and (LANGUAGE_MODEL in there or LANGUAGE_MODEL in fetched):
        jax.config.update("jax_platforms", "cpu")  # nothing here needs an accelerator
        convert_language_model(root, convert, keep=arguments.keep or LANGUAGE_MODEL in there, log=print)
    for entry in (CATALOGUE[name] for name in by_hand):
        print(f"by hand {entry.what}: open {entry.page} and save the file as {root / entry.target}")
    return 2 if len(there) + len(fetched) + len(by_hand) < len(names) else 1 if by_hand else 0


def make_parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog="emollama fetch",
        usage="emollama fetch NAME [NAME ...] [--to FOLDER] [--convert DTYPE [--keep]]\n       emollama fetch --list",
        description="Downloads weights of the real model from where their authors give them, several files at once, "
        "and goes on where it was stopped. Sizes and hashes are compared; what has its name is whole. HF_TOKEN, "
        "HF_ENDPOINT and the other variables of huggingface_hub count. Exit code 0: all is there, 1: something has to "
        "be fetched by hand, which is said at the end, 2: something could not be fetched.",
        epilog="example: emollama fetch all --to weights --convert int8",
    )
    parser.add_argument("names", nargs="*", type=_name, metavar="NAME", help=", ".join((*CATALOGUE, ALL)))
    parser.add_argument(
        "--to", type=local_path, default=Path("weights"), metavar="FOLDER", help="where they go (default: %(default)s)"
    )
    parser.add_argument(
        "--convert",
        choices=("int8", "nf4", "bfloat16"),
        help=f"make {BASE} of {LANGUAGE_MODEL}, a base checkpoint with such kernels, which training and prediction "
        "load; the download is removed",
    )
    parser.add_argument("--keep", action="store_true", help="keep the download that is converted")
    parser.add_argument(
        "--list", action="store_true", help="print what there is: its place, size, licence, access and origin"
    )
    return parser


def _name(text: str) -> str:
    if text not in (*CATALOGUE, ALL):
        raise argparse.ArgumentTypeError(f"no weights {text!r}; give some of {', '.join(CATALOGUE)}, or {ALL}")
    return text


def _names(arguments: argparse.Namespace) -> list[str]:
    """What is to be fetched."""
    if not arguments.names:
        raise UserError("name what to fetch, or all; emollama fetch --list shows what there is")
    names = list(CATALOGUE) if ALL in arguments.names else list(dict.fromkeys(arguments.names))
    if (arguments.convert and LANGUAGE_MODEL not in names) or (arguments.keep and not arguments.convert):
        raise UserError(
            f"--convert: makes a base checkpoint of {LANGUAGE_MODEL}, which must be among the names; --keep goes with "
            "it"
        )
    return names


def _fetch_all(names: Sequence[str], root: Path) -> list[str]:
    """Downloads what is named, at the same time; returns what came, and reports what did not."""
    plans, fetched, stop, lock = {}, [], threading.Event(), threading.Lock()
    for name in names:
        with _reported(name):
            plans[name] = plan_fetch(name)
    if not plans:
        return []
    progress = Progress(sum(plan.size for plan in plans.values()), "B")

    def count(size: int) -> None:
        if stop.is_set():
            raise UserError(f"stopped; {GO_ON}")
        with lock:
            progress(size)

    with ThreadPoolExecutor(len(plans)) as pool:
        futures = {name: pool.submit(fetch, plan, root, count) for name, plan in plans.items()}
        try:
            for name, future in futures.items():
                with _reported(name):
                    print(f"fetched {future.result()} ({CATALOGUE[name].licence})")
                    fetched.append(name)
        finally:
            stop.set()  # nobody waits after an interrupt
            progress.close()
    return fetched


@contextlib.contextmanager
def _reported(name: str) -> Iterator[None]:
    """Prints an error that the user can mend, and goes on."""
    try:
        yield
    except Exception as error:
        if (known := as_user_error(error)) is None:
            raise
        print(f"emollama fetch: error: {name}: {known}", file=sys.stderr)


def _table(root: Path) -> list[str]:
    rows = [("name", "below " + str(root), "is", "size", "licence", "access", "from")]
    for name, entry in CATALOGUE.items():
        size = f"{tqdm.format_sizeof(entry.size)}B" if entry.size else "?"
        rows.append((name, entry.target, state_of(entry, root) or "-", size, entry.licence, entry.access, entry.origin))
    return align(rows, left=True)
