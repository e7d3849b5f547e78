"""What `serve` and `demo` share: the engine's arguments, and the package's extra that they need."""

import argparse
import dataclasses
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from emollama_jax.cli._arguments import at_least
from emollama_jax.cli._model import (
    add_encoder_arguments,
    add_frame_argument,
    add_model_arguments,
    check_video_arguments,
    model_options,
    video_options,
)
from emollama_jax.cli._subtitles import add_subtitle_arguments, check_subtitle_arguments
from emollama_jax.config import Config
from emollama_jax.data.modalities import ALL, check_modalities
from emollama_jax.errors import UserError
from emollama_jax.infer.engine import Engine
from emollama_jax.io.worker_pool import default_workers
from emollama_jax.runs.run import Run
from emollama_jax.serve.settings import ServeSettings

KEY = "EMOLLAMA_API_KEY"


def log(line: str) -> None:
    print(f"emollama: {line}", file=sys.stderr, flush=True)


def import_serve(module: str) -> ModuleType:
    """Import a module of `emollama_jax.serve`. Raises UserError where its packages are missing."""
    try:
        return importlib.import_module(f"emollama_jax.serve.{module}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("emollama_jax"):
            raise
        raise UserError(f"a server needs {error.name}; pip install 'emollama_jax[serve]'") from error


def check_engine_arguments(arguments: argparse.Namespace, config: Config) -> Config:
    """Return the experiment with the longest clip that is taken. Raises UserError for arguments that do not fit."""
    check_modalities(arguments.modalities)
    check_subtitle_arguments(arguments)
    check_video_arguments(arguments)
    if arguments.max_seconds is None:
        return config
    try:
        return dataclasses.replace(config, clip=dataclasses.replace(config.clip, max_seconds=arguments.max_seconds))
    except ValueError as error:
        raise UserError(f"--max-seconds: {error}") from error


def load_engine(config: Config, arguments: argparse.Namespace) -> Engine:
    options = model_options(arguments) | video_options(arguments)
    asked = {name: getattr(arguments, name) for name in ("modalities", "orders", "slots")}
    return Engine.load(config=config, log=log, **options, **asked)


def make_settings(arguments: argparse.Namespace, **more: Any) -> ServeSettings:
    """Return the settings that `serve` and `demo` have arguments for, and `more`. Raises UserError: see there."""
    names = ("host", "port", "insecure", "slots", "max_queue", "max_upload_mb", "request_timeout", "warmup")
    shared = {name: getattr(arguments, name) for name in (*names, "cache_mib")}
    shared |= {"model_name": name_of_model(arguments), "readers": arguments.workers or default_workers()}
    return ServeSettings(**shared | more)


def name_of_model(arguments: argparse.Namespace) -> str:
    """What clients call the model: the name of the run's folder, or of the file of trained weights."""
    trained = arguments.trained
    name = Path(str(trained.path if isinstance(trained, Run) else trained or "emollama")).stem
    return re.sub(r"[^\w.-]+", "-", name) or "emollama"


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `serve` and `demo` share: the engine, and how much it is asked at once."""
    group = parser.add_argument_group("how clips are asked about")
    group.add_argument("--orders", type=at_least(1), default=1, metavar="N", help="of the labels (default: 1)")
    group.add_argument("--modalities", default=ALL, help="any of A (audio), V (video), T (text) (default: %(default)s)")
    add_frame_argument(group)
    add_subtitle_arguments(group)
    group.add_argument("--workers", type=at_least(1), metavar="N", help="reading processes (default: the processors)")
    group.add_argument("--slots", type=at_least(1), default=8, metavar="N", help="answers at a time (default: 8)")
    group.add_argument("--max-queue", type=at_least(0), default=64, metavar="N", help="more wait not (default: 64)")
    group.add_argument(
        "--max-upload-mb", type=at_least(1), default=64, metavar="MB", help="of a clip (default: %(default)s)"
    )
    group.add_argument("--max-seconds", type=seconds, metavar="S", help="of a clip (default: clip.max_seconds)")
    group.add_argument(
        "--request-timeout", type=seconds, default=120.0, metavar="S", help="of a request (default: %(default)g)"
    )
    group.add_argument(
        "--cache-mib",
        type=at_least(0),
        default=512,
        metavar="MIB",
        help="of clips that are kept (default: 512)",
    )
    group.add_argument(
        "--warmup",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile what requests need as the server starts (default: yes)",
    )
    add_model_arguments(parser)
    add_encoder_arguments(parser)


def seconds(text: str) -> float:
    """An argument's type: a number above 0."""
    try:
        if 0 < (value := float(text)) < float("inf"):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
