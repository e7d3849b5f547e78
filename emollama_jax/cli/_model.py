"""What `predict` and `evaluate` share: the model's arguments, the experiment it belongs to, and its start."""

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from emollama_jax.config import Config, parse_flags
from emollama_jax.errors import UserError, first_line
from emollama_jax.models.emotion_llama import EmotionLlama
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.runs.run import Run
from emollama_jax.sharding import make_mesh, use_mesh
from emollama_jax.text.tokenizers import Tokenizer
from emollama_jax.weights.emotion_llama import load_emotion_llama
from emollama_jax.weights.pretrained import load_tokenizer_of

IMAGE_ENCODER = ("eva_vit", "ln_vision")


class StartError(UserError):
    """The model could not be started."""

    exit_code = 3


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
        "--any-encoders", action="store_true", help="take features of other encoders than those the run learnt"
    )
    group.add_argument(  # for the help: parse_flags has taken it by then
        "--config",
        metavar="NAME_OR_PATH",
        default=argparse.SUPPRESS,
        help="the experiment (default: the run's own, on one device); --config.GROUP.FIELD=VALUE changes it",
    )


def read_experiment(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[Config, argparse.Namespace, Run | None]:
    """Reads the experiment, the other arguments, with the experiment's base where none is given, and the trained run.

    A run's own experiment is used where no `--config` names another. The run is None where `--trained` is none.
    """
    if {"-h", "--help"} & set(argv):
        parser.parse_args(argv)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--trained")
    trained = early.parse_known_args(argv)[0].trained
    run = Run.find(trained)
    config, rest = parse_flags(argv, run.config_for_inference() if run else None)
    arguments = parser.parse_args(rest)
    arguments.base = arguments.base or config.weights.base
    if not arguments.base:
        raise UserError("--base: no language model; give a base checkpoint, made by emollama convert")
    return config, arguments, run


def image_encoder_of(config: Config, arguments: argparse.Namespace, run: Run | None) -> dict[str, str]:
    """The files of the encoder of frames. Raises UserError for none, or for another than the run was trained with."""
    named = {name: getattr(arguments, name) or getattr(config.weights, name) for name in IMAGE_ENCODER}
    if not Path(named["eva_vit"]).is_file():
        raise UserError(f"--eva-vit: no such file: {named['eva_vit']}; clips come as frames, which need the encoder")
    if run and not arguments.any_encoders:
        run.check_image_encoder(named["eva_vit"])
    return {name: file for name, file in named.items() if file}


def load_model(
    config: Config,
    arguments: argparse.Namespace,
    run: Run | None,
    mesh: Mesh | None,
    *,
    files: Mapping[str, str],
    eva_vit: EvaVit | None = None,
) -> tuple[EmotionLlama, Tokenizer]:
    """The model that the arguments name, and its tokenizer.

    Args:
        files: of the encoder of frames, where it comes from files (see `image_encoder_of`).
        eva_vit: one that does not.

    Raises:
        StartError: it cannot be started.
        UserError: the encoder of frames is another than made the image tokens that the run was trained on.
    """
    with starting():
        trained = run.trained_weights() if run else arguments.trained
        model, _ = load_emotion_llama(arguments.base, config, trained=trained, mesh=mesh, **files)
        tokenizer = load_tokenizer_of(arguments.base, config.llama.vocab_size)
    if eva_vit is not None:
        model = EmotionLlama(model.llama, model.projectors, eva_vit)
    if model.eva_vit is not None and run and not arguments.any_encoders:
        run.check_image_tokens(model.eva_vit)
    return model, tokenizer


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """What goes wrong within the block is a `StartError`."""
    try:
        yield
    except UserError as error:
        raise StartError(str(error)) from error
    except jax.errors.JaxRuntimeError as error:  # too little memory, for the most part
        raise StartError(f"the devices cannot hold the model: {first_line(error)}") from error


def mesh_of(config: Config) -> Mesh | None:
    """The experiment's mesh, on the first devices; None is the first device alone."""
    sizes = dataclasses.asdict(config.mesh)
    count = math.prod(sizes.values())
    if count == 1:
        return None
    return make_mesh(sizes, jax.devices()[:count] if count > 0 else None)


@contextlib.contextmanager
def on_devices(config: Config, mesh: Mesh | None) -> Iterator[None]:
    """Within the block computations are on the mesh, and compiled programs are kept for later starts."""
    if config.train.compile_cache and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.train.compile_cache).expanduser()))
    with use_mesh(mesh, config.sharding) if mesh else contextlib.nullcontext():
        yield
