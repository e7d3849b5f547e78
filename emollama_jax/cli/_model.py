"""What `predict` and `evaluate` share: the model's arguments, and the experiment that the model belongs to."""

import argparse
from collections.abc import Sequence
from typing import Any

from emollama_jax.cli._arguments import VerbParser, add_config_argument, parse
from emollama_jax.config import Config
from emollama_jax.data.datasets import IndexedRecords, find_encoders, find_images
from emollama_jax.runs.run import Run

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


def read_experiment(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    """Parse the experiment and the other arguments, with the `Run` in `trained` where that names one.

    Without `--config` the experiment is that of the run; answers in a file (`--predictions`) need none.
    """
    early = VerbParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    early.add_argument("--trained")
    early.add_argument("--predictions")
    known = early.parse_known_args(argv)[0]
    run = Run.find(known.trained)
    default = Config() if known.predictions else None
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
