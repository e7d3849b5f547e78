"""What `prepare` and `extract` share: where a data set's files are, and how it is written and reported on."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from emollama_jax.cli._arguments import add_label_arguments, at_least
from emollama_jax.data.annotation_files import KNOWN, AnnotationFiles, find_annotation_files
from emollama_jax.data.annotations import Annotations, read_annotations
from emollama_jax.data.prepare import DATASETS, MakeParts, PreparedDataset, prepare
from emollama_jax.data.problems import PUT_ASIDE
from emollama_jax.data.recipe import Recipe
from emollama_jax.data.records import IMAGE_STORAGE
from emollama_jax.errors import UserError
from emollama_jax.io.paths import PathLike, local_path
from emollama_jax.io.worker_pool import default_workers
from emollama_jax.media.clip import FRAME_RULES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", choices=tuple(DATASETS), help="the data set; clips: your own")
    parser.add_argument("root", type=local_path, nargs="?", help="its folder, for the data sets that are known")
    parser.add_argument(
        "--out", type=epath.Path, default=epath.Path("data"), help="where records go (default: %(default)s)"
    )
    parser.add_argument(
        "--frame-rule",
        "--frame",
        metavar="RULE",
        default="first",
        help=f"which frame is kept: {', '.join(FRAME_RULES)} or a number (default: %(default)s)",
    )
    parser.add_argument(
        "--image-storage",
        "--image",
        choices=IMAGE_STORAGE,
        default="frame",
        help="what is kept of it (default: %(default)s)",
    )
    parser.add_argument("--eva-vit", type=epath.Path, metavar="FILE", help="its encoder, for --image image_tokens")
    parser.add_argument(
        "--fold", type=int, choices=range(1, 6), default=1, help="of DFEW, 1 to 5 (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=at_least(1), default=default_workers(), metavar="N", help="default: the processors"
    )
    parser.add_argument("--strict", action="store_true", help="stop at any problem, before any work")
    parser.add_argument(
        "--report", type=epath.Path, metavar="FILE", help="of problems (default: OUT/DATA.problems.jsonl)"
    )
    own = parser.add_argument_group("where files are, for clips of your own or files in other places")
    own.add_argument(
        "--list", action="append", default=[], metavar="SPLIT=FILE", help="clips of a split: a list or table"
    )
    for name in ("coarse", "fine", "subtitles", "videos", "openface"):
        own.add_argument(f"--{name}", type=local_path, metavar="PATH")
    own.add_argument(
        "--features", type=local_path, nargs=3, metavar=("MAE", "VIDEOMAE", "HUBERT"), help="folders of .npy"
    )
    add_label_arguments(own, "default: the data set's, or MERR's nine")


def check_image(image: str, eva_vit: PathLike | None) -> None:
    """Raises UserError for image tokens without their encoder, and for an encoder without use."""
    if (image == "image_tokens") != bool(eva_vit):
        raise UserError("--eva-vit: the encoder's file goes with --image image_tokens, and only there")


def annotation_files_of(arguments: argparse.Namespace) -> AnnotationFiles:
    """Find the files that the arguments name."""
    if arguments.data in KNOWN and arguments.root is None:
        raise UserError(f"{arguments.data}: give its folder, as in emollama prepare {arguments.data} FOLDER")
    if arguments.data not in KNOWN and not (arguments.list or arguments.videos):
        raise UserError("clips: give one or more --list SPLIT=FILE, or a folder of --videos")
    lists = [item.partition("=") for item in arguments.list]
    if wrong := [split for split, given, path in lists if not (split.isidentifier() and path)]:
        raise UserError(f"--list {wrong[0]}: write SPLIT=FILE, as in --list train=train.csv")
    given: dict[str, Any] = {
        **{name: getattr(arguments, name) for name in ("coarse", "fine", "subtitles", "videos", "openface")},
        "lists": tuple((split, Path(path)) for split, _, path in lists),
        "features": arguments.features and tuple(arguments.features),
        "labels": arguments.labels,
    }
    given = {name: value for name, value in given.items() if value}
    if arguments.label_numbers is not None:
        given["first_number"] = arguments.label_numbers
    return find_annotation_files(arguments.data, arguments.root, fold=arguments.fold, **given)


def write_data_set(
    name: str,
    files: AnnotationFiles,
    recipe: Recipe,
    make_parts: Callable[[Annotations], MakeParts],
    *,
    out: epath.Path,
    report: epath.Path | None = None,
    strict: bool = False,
    process: int = 0,
    **options: Any,
) -> tuple[PreparedDataset, int]:
    """Read the annotations, have the records made, and report on both.

    Args:
        make_parts: from the annotations to what makes the records.
        report: the file of problems; default: `out`/NAME.problems.jsonl.
        process: of several that share the work, which one; the first reports.
        options: of `prepare`.

    Returns:
        The data set and the exit code: 1 when clips were put aside.
    """
    annotations = read_annotations(files, strict=strict)
    report = report or out / f"{name}.problems.jsonl"
    if process == 0:
        annotations.write_problems(report)
        print(annotations.summary())
    if not annotations.clips:
        where = ", ".join(str(path) for _, path in files.lists) or files.videos
        reasons = [f": {problem}" for problem in annotations.problems if problem.kind in PUT_ASIDE]
        raise UserError(f"no clip that can be used in {where}; {report} says why{''.join(reasons[:1])}")
    prepared = prepare(name, annotations, out, recipe, make_parts(annotations), process=process, **options)
    problems = (*annotations.problems, *prepared.problems)
    aside = sum(problem.kind in PUT_ASIDE for problem in problems)
    if process == 0:
        Annotations(annotations.clips, problems).write_problems(report)
        counts = ", ".join(f"{split} {count:,}" for split, count in prepared.counts.items())
        print(f"{'already there:' if prepared.was_there else 'wrote'} {prepared.path} ({counts})")
        if problems:
            print(f"{len(problems)} problems, {aside} clips put aside: {report}")
    return prepared, 1 if aside else 0
