"""Turn videos, features and annotations into records for training."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tensorflow_datasets as tfds

from emollama_jax.cli._arguments import at_least
from emollama_jax.data.annotations import Annotations, Sources, dfew, mer2023, mer2024, merr, read_annotations
from emollama_jax.data.builders import BUILDERS, prepare
from emollama_jax.data.preparation import FRAME_RULES, Encode, Recipe
from emollama_jax.data.processes import default_workers
from emollama_jax.data.records import IMAGES
from emollama_jax.data.tables import PUT_ASIDE
from emollama_jax.errors import UserError
from emollama_jax.text.labels import MERR

KNOWN: dict[str, Callable[..., Sources]] = {"merr": merr, "mer2023": mer2023, "mer2024": mer2024, "dfew": dfew}


def run(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    sources = _sources(arguments)
    annotations = read_annotations(sources, strict=arguments.strict)
    report = arguments.report or arguments.out / f"{arguments.data}.problems.jsonl"
    annotations.write_problems(report)
    print(annotations.summary())
    if not annotations.clips:
        lists = ", ".join(str(path) for _, path in sources.lists)
        raise UserError(f"no clip that can be used in {lists}; {report} says why")
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    encode, encoder = _encoder(arguments)
    prepared = prepare(
        BUILDERS[arguments.data],
        annotations,
        arguments.out,
        Recipe(labels=sources.labels or MERR, frame=arguments.frame, image=arguments.image, encoder=encoder),
        workers=arguments.workers,
        encode=encode,
        beam_runner=arguments.beam,
    )
    problems = (*annotations.problems, *prepared.problems)
    Annotations(annotations.clips, problems).write_problems(report)
    counts = ", ".join(f"{split} {count:,}" for split, count in prepared.counts.items())
    print(f"{'already there:' if prepared.was_there else 'wrote'} {prepared.path} ({counts})")
    aside = sum(problem.kind in PUT_ASIDE for problem in problems)
    if problems:
        print(f"{len(problems)} problems, {aside} clips put aside: {report}")
    return 1 if aside else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="emollama prepare",
        description="Reads a data set's lists, captions, subtitles, videos and features, reports every problem by name "
        "and line, and writes the sound clips as records (TFDS, ArrayRecord), which training and evaluation read as "
        "FOLDER:SPLIT. Goes on where it was stopped. Exit code 1: some clips had to be put aside.",
        epilog="example: emollama prepare merr MERR --out data --frame peak --workers 16",
    )
    parser.add_argument("data", choices=tuple(BUILDERS), help="the data set; clips: lists of your own")
    parser.add_argument("root", type=Path, nargs="?", help="its folder, for the data sets that are known")
    parser.add_argument("--out", type=Path, default=Path("data"), help="where records go (default: %(default)s)")
    parser.add_argument("--frame", default="first", help=f"{', '.join(FRAME_RULES)} or a number (default: %(default)s)")
    parser.add_argument("--image", choices=IMAGES, default="frame", help="how it is kept (default: %(default)s)")
    parser.add_argument("--eva-vit", type=Path, metavar="FILE", help="the encoder, for --image image_tokens")
    parser.add_argument(
        "--fold", type=int, choices=range(1, 6), default=1, help="of DFEW, 1 to 5 (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=at_least(1), default=default_workers(), metavar="N", help="default: the processors"
    )
    parser.add_argument("--strict", action="store_true", help="stop at any problem, before any work")
    parser.add_argument("--report", type=Path, metavar="FILE", help="of problems (default: OUT/DATA.problems.jsonl)")
    parser.add_argument("--beam", metavar="RUNNER", help="prepare with Apache Beam on this runner")
    own = parser.add_argument_group("where files are, for clips of your own or files in other places")
    own.add_argument(
        "--list", action="append", default=[], metavar="SPLIT=FILE", help="clips of a split: a list, .csv or .jsonl"
    )
    for name in ("coarse", "fine", "subtitles", "videos"):
        own.add_argument(f"--{name}", type=Path, metavar="PATH")
    own.add_argument("--features", type=Path, nargs=3, metavar=("MAE", "VIDEOMAE", "HUBERT"), help="folders of .npy")
    own.add_argument("--labels", help="separated by commas (default: the data set's, or MERR's nine)")
    return parser


def _sources(arguments: argparse.Namespace) -> Sources:
    if arguments.data in KNOWN:
        if arguments.root is None:
            raise UserError(f"{arguments.data}: give its folder, as in emollama prepare {arguments.data} FOLDER")
        options = {"fold": arguments.fold} if arguments.data == "dfew" else {}
        sources = KNOWN[arguments.data](arguments.root, **options)
    elif arguments.list:
        sources = Sources(lists=(), labels=MERR)
    else:
        raise UserError("clips: give one or more --list SPLIT=FILE")
    lists = [item.partition("=") for item in arguments.list]
    if wrong := [split for split, given, path in lists if not (split.isidentifier() and path)]:
        raise UserError(f"--list {wrong[0]}: write SPLIT=FILE, as in --list train=train.csv")
    given = {name: getattr(arguments, name) for name in ("coarse", "fine", "subtitles", "videos")}
    changes = {name: path for name, path in given.items() if path is not None}
    if lists:
        changes["lists"] = tuple((split, Path(path)) for split, _, path in lists)
    if arguments.features:
        changes["features"] = tuple(arguments.features)
    if arguments.labels:
        changes["labels"] = tuple(label.strip() for label in arguments.labels.split(","))
    return replace(sources, **changes)


def _encoder(arguments: argparse.Namespace) -> tuple[Encode | None, str]:
    """From frames to image tokens, and the fingerprint of what does it."""
    if (arguments.image == "image_tokens") != bool(arguments.eva_vit):
        raise UserError("--eva-vit: the encoder's file goes with --image image_tokens, and only there")
    if not arguments.eva_vit:
        return None, ""
    from flax import nnx

    from emollama_jax.features.encode import encode_images
    from emollama_jax.weights.base_checkpoint import fingerprint_of
    from emollama_jax.weights.engine import param_values
    from emollama_jax.weights.eva_vit import load_eva_vit

    model, _ = load_eva_vit(arguments.eva_vit)
    return lambda frames: encode_images(model, frames), fingerprint_of(param_values(nnx.state(model)))
