"""What verbs that ask a model share: its arguments, those of its encoders, and the experiment that it belongs to."""

import argparse
from collections.abc import Sequence
from typing import Any

from emollama_jax.cli._arguments import VerbParser, add_config_argument, parse
from emollama_jax.config import Config
from emollama_jax.data.datasets import IndexedRecords, find_encoders, find_images
from emollama_jax.errors import UserError
from emollama_jax.media.clip import FRAME_RULES
from emollama_jax.runs.run import Run
from emollama_jax.text.prompts import FEATURES

MODEL_OPTIONS = ("trained", "base", "eva_vit", "ln_vision", "any_encoders", "any_base", "any_labels")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--trained",
        metavar="FILE",
        help="adapters and projectors: a run or a checkpoint of it, a .pth or a PEFT folder (default: new ones)",
    )
    group.add_argument("--base", metavar="FOLDER", help="the language model (default: the experiment's weights.base)")
    group.add_argument("--eva-vit", metavar="FILE", help="the encoder of frames (default: weights.eva_vit)")
    group.add_argument("--ln-vision", metavar="FILE", help="the norm after it (default: weights.ln_vision)")
    group.add_argument(
        "--any-encoders", action="store_true", help="take features of other encoders than the run was trained with"
    )
    group.add_argument(
        "--any-base", action="store_true", help="take another language model than the weights were trained on"
    )
    group.add_argument("--any-labels", action="store_true", help="ask for other labels than the run was trained on")
    add_config_argument(group, default="the run's own, on one device")


def add_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the encoders of videos")
    for name, what in zip(FEATURES, ("face", "motion", "voice"), strict=True):
        default = f"default: weights.{name}; '' for none"
        group.add_argument(f"--{name}", metavar="FILE", help=f"the encoder of the {what} ({default})")
    group.add_argument("--random-encoders", action="store_true", help="untrained encoders, for trials")


def add_frame_argument(parser: argparse._ActionsContainer) -> None:
    rules = f"{', '.join(FRAME_RULES)} or a number from 0"
    parser.add_argument("--frame", metavar="RULE", help=f"{rules} (default: that of the run's data, else first)")


def check_video_arguments(arguments: argparse.Namespace) -> None:
    """Raises UserError for an unknown frame rule, or files of encoders beside random ones."""
    if arguments.frame is not None and arguments.frame not in FRAME_RULES and not arguments.frame.isdecimal():
        raise UserError(f"--frame {arguments.frame}: give {', '.join(FRAME_RULES)} or a frame's number from 0")
    if arguments.random_encoders and any(getattr(arguments, name) for name in FEATURES):
        raise UserError("--random-encoders: goes in place of --mae, --videomae and --hubert")


def video_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Engine.load` about how videos are read and encoded."""
    options = {name: getattr(arguments, name) for name in (*FEATURES, "random_encoders", "recogniser")}
    options |= {"frame_rule": arguments.frame, "subtitle_sources": arguments.subtitles_from}
    return options | {"subtitle_language": arguments.subtitle_language}


def read_experiment(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    """Parse the experiment and the other arguments, with the `Run` in `trained` where that names one.

    Without `--config` the experiment is that of the run; answers in a file (`--predictions`) or of a server
    (`--server`) need none.
    """
    early = VerbParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    early.add_argument("--trained")
    early.add_argument("--predictions")
    early.add_argument("--server")
    known = early.parse_known_args(argv)[0]
    run = Run.find(known.trained)
    default = Config() if known.predictions or known.server else None
    config, arguments = parse(parser, argv, default=run.config_for_inference() if run else default)
    arguments.trained = run or arguments.trained
    return config, arguments


def model_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Engine.load` that `add_model_arguments` adds."""
    return {name: getattr(arguments, name) for name in MODEL_OPTIONS}


def inputs_of_records(arguments: argparse.Namespace, datasets: Sequence[IndexedRecords]) -> str:
    """The `inputs` of `Engine.load` for these data sets.

    Raises:
        UserError: they differ in their images, or have features of other encoders than the run was trained with.
    """
    if isinstance(arguments.trained, Run) and not arguments.any_encoders:
        arguments.trained.check_encoders(find_encoders(datasets))
    return find_images(datasets)
