"""Turn videos, features and annotations into records for training."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence

from emollama_jax.cli._arguments import VerbParser
from emollama_jax.cli._data_sets import add_arguments, annotation_files_of, check_image, write_data_set
from emollama_jax.data.parts import EncodedClips, PartMaker
from emollama_jax.data.recipe import Recipe
from emollama_jax.io.paths import PathLike
from emollama_jax.media.clip_reader import ClipRead


def run(argv: list[str]) -> int:
    arguments = make_parser().parse_args(argv)
    check_image(arguments.image_storage, arguments.eva_vit)
    files = annotation_files_of(arguments)
    recipe = Recipe(labels=files.labels, frame_rule=arguments.frame_rule)
    maker = PartMaker(workers=arguments.workers)
    if arguments.eva_vit:
        recipe, maker.encode = _with_image_tokens(recipe, arguments.eva_vit)
    _, code = write_data_set(
        arguments.data,
        files,
        recipe,
        lambda annotations: maker,
        out=arguments.out,
        report=arguments.report,
        strict=arguments.strict,
    )
    return code


def make_parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog="emollama prepare",
        description="Reads a data set's lists, captions, subtitles, videos and features, reports every problem by name "
        "and line, and writes the sound clips as records (TFDS, ArrayRecord), which training and evaluation read as "
        "FOLDER:SPLIT. Goes on where it was stopped. Exit code 1: some clips had to be put aside.",
        epilog="example: emollama prepare merr MERR --out data --frame-rule peak --workers 16",
    )
    add_arguments(parser)
    return parser


def _with_image_tokens(
    recipe: Recipe, eva_vit: PathLike
) -> tuple[Recipe, Callable[[Sequence[ClipRead]], EncodedClips]]:
    """The recipe with this encoder's image tokens in place of frames, and what encodes them."""
    from emollama_jax.config import Config
    from emollama_jax.features.encoders import load_encoders
    from emollama_jax.features.extract import ClipEncoder

    config = Config()
    encoders = load_encoders(config, eva_vit=eva_vit)
    recipe = dataclasses.replace(recipe, image_storage="image_tokens", encoders=encoders.fingerprints(config))
    return recipe, ClipEncoder(encoders, recipe.feature_size)
