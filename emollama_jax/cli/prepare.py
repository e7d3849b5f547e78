"""Turn videos, features and annotations into records for training."""

import argparse

from emollama_jax.cli._data_sets import add_arguments, check_image, write_data_set
from emollama_jax.data.preparation import Encode, Preparation, Recipe


def run(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    encode, encoder = _encoder(arguments)

    def recipe(labels: tuple[str, ...]) -> Recipe:
        return Recipe(labels=labels, frame=arguments.frame, image=arguments.image, encoder=encoder)

    preparation = Preparation(arguments.workers, encode)
    _, code = write_data_set(arguments, recipe, lambda annotations: preparation, beam_runner=arguments.beam)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="emollama prepare",
        description="Reads a data set's lists, captions, subtitles, videos and features, reports every problem by name "
        "and line, and writes the sound clips as records (TFDS, ArrayRecord), which training and evaluation read as "
        "FOLDER:SPLIT. Goes on where it was stopped. Exit code 1: some clips had to be put aside.",
        epilog="example: emollama prepare merr MERR --out data --frame peak --workers 16",
    )
    add_arguments(parser)
    parser.add_argument("--beam", metavar="RUNNER", help="prepare with Apache Beam on this runner")
    return parser


def _encoder(arguments: argparse.Namespace) -> tuple[Encode | None, str]:
    """From frames to image tokens, and the fingerprint of what does it."""
    check_image(arguments)
    if not arguments.eva_vit:
        return None, ""
    from flax import nnx

    from emollama_jax.features.encode import encode_images
    from emollama_jax.weights.base_checkpoint import fingerprint_of
    from emollama_jax.weights.engine import param_values
    from emollama_jax.weights.eva_vit import load_eva_vit

    model, _ = load_eva_vit(arguments.eva_vit)
    return lambda frames: encode_images(model, frames), fingerprint_of(param_values(nnx.state(model)))
