"""What `prepare` and `extract` share: where a data set's files are, and how it is written and reported on."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from emollama_jax.cli._arguments import at_least
from emollama_jax.data.annotations import Annotations, Sources, dfew, mer2023, mer2024, merr, read_annotations
from emollama_jax.data.builders import BUILDERS, MakeParts, PreparedDataset, prepare
from emollama_jax.data.preparation import Recipe
from emollama_jax.data.records import IMAGES
from emollama_jax.data.tables import PUT_ASIDE
from emollama_jax.errors import UserError
from emollama_jax.io.worker_pool import default_workers
from emollama_jax.media.clip import FRAME_RULES
from emollama_jax.text.labels import MERR

KNOWN: dict[str, Callable[..., Sources]] = {"merr": merr, "mer2023": mer2023, "mer2024": mer2024, "dfew": dfew}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", choices=tuple(BUILDERS), help="the data set; clips: your own")
    parser.add_argument("root", type=Path, nargs="?", help="its folder, for the data sets that are known")
    parser.add_argument("--out", type=Path, default=Path("data"), help="where records go (default: %(default)s)")
    parser.add_argument("--frame", default="first", help=f"{', '.join(FRAME_RULES)} or a number (default: %(default)s)")
    parser.add_argument("--image", choices=IMAGES, default="frame", help="how it is kept (default: %(default)s)")
    parser.add_argument("--eva-vit", type=Path, metavar="FILE", help="its encoder, for --image image_tokens")
    parser.add_argument(
        "--fold", type=int, choices=range(1, 6), default=1, help="of DFEW, 1 to 5 (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=at_least(1), default=default_workers(), metavar="N", help="default: the processors"
    )
    parser.add_argument("--strict", action="store_true", help="stop at any problem, before any work")
    parser.add_argument("--report", type=Path, metavar="FILE", help="of problems (default: OUT/DATA.problems.jsonl)")
    own = parser.add_argument_group("where files are, for clips of your own or files in other places")
    own.add_argument(
        "--list", action="append", default=[], metavar="SPLIT=FILE", help="clips of a split: a list, .csv or .jsonl"
    )
    for name in ("coarse", "fine", "subtitles", "videos", "openface"):
        own.add_argument(f"--{name}", type=Path, metavar="PATH")
    own.add_argument("--features", type=Path, nargs=3, metavar=("MAE", "VIDEOMAE", "HUBERT"), help="folders of .npy")
    own.add_argument("--labels", help="separated by commas (default: the data set's, or MERR's nine)")


def check_image(arguments: argparse.Namespace) -> None:
    """Raises UserError for image tokens without their encoder, and for an encoder without use."""
    if (arguments.image == "image_tokens") != bool(arguments.eva_vit):
        raise UserError("--eva-vit: the encoder's file goes with --image image_tokens, and only there")


def sources_of(arguments: argparse.Namespace) -> Sources:
    """The files that the arguments name."""
    if arguments.data in KNOWN:
        if arguments.root is None:
            raise UserError(f"{arguments.data}: give its folder, as in emollama prepare {arguments.data} FOLDER")
        options = {"fold": arguments.fold} if arguments.data == "dfew" else {}
        sources = KNOWN[arguments.data](arguments.root, **options)
    elif arguments.list or arguments.videos:
        sources = Sources(lists=(), labels=MERR)
    else:
        raise UserError("clips: give one or more --list SPLIT=FILE, or a folder of --videos")
    lists = [item.partition("=") for item in arguments.list]
    if wrong := [split for split, given, path in lists if not (split.isidentifier() and path)]:
        raise UserError(f"--list {wrong[0]}: write SPLIT=FILE, as in --list train=train.csv")
    given = {name: getattr(arguments, name) for name in ("coarse", "fine", "subtitles", "videos", "openface")}
    changes: dict[str, Any] = {name: path for name, path in given.items() if path is not None}
    if lists:
        changes["lists"] = tuple((split, Path(path)) for split, _, path in lists)
    if arguments.features:
        changes["features"] = tuple(arguments.features)
    if arguments.labels:
        changes["labels"] = tuple(label.strip() for label in arguments.labels.split(","))
    return replace(sources, **changes)


def write_data_set(
    arguments: argparse.Namespace,
    recipe_of: Callable[[tuple[str, ...]], Recipe],
    make_parts: Callable[[Annotations], MakeParts],
    **options: Any,
) -> tuple[PreparedDataset, int]:
    """Reads the annotations, has the records made, and reports on both.

    Args:
        recipe_of: from the labels to the recipe.
        make_parts: from the annotations to what makes the records.
        options: of `prepare`.

    Returns:
        The data set and the exit code: 1 when clips were put aside.
    """
    sources = sources_of(arguments)
    annotations = read_annotations(sources, strict=arguments.strict)
    leads = options.get("process", 0) == 0
    report = arguments.report or arguments.out / f"{arguments.data}.problems.jsonl"
    if leads:
        annotations.write_problems(report)
        print(annotations.summary())
    if not annotations.clips:
        where = ", ".join(str(path) for _, path in sources.lists) or sources.videos
        raise UserError(f"no clip that can be used in {where}; {report} says why")
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder, recipe = BUILDERS[arguments.data], recipe_of(sources.labels or MERR)
    prepared = prepare(builder, annotations, arguments.out, recipe, make_parts(annotations), **options)
    problems = (*annotations.problems, *prepared.problems)
    aside = sum(problem.kind in PUT_ASIDE for problem in problems)
    if leads:
        Annotations(annotations.clips, problems).write_problems(report)
        counts = ", ".join(f"{split} {count:,}" for split, count in prepared.counts.items())
        print(f"{'already there:' if prepared.was_there else 'wrote'} {prepared.path} ({counts})")
        if problems:
            print(f"{len(problems)} problems, {aside} clips put aside: {report}")
    return prepared, 1 if aside else 0
