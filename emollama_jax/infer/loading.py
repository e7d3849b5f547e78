"""The parts of an engine, from files: the experiment, the mesh, the model, and the encoders of videos."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import jax
from jax.sharding import Mesh

from emollama_jax.config import Config
from emollama_jax.errors import StartError, as_user_error
from emollama_jax.features.encoders import Encoders, load_encoders, random_encoders
from emollama_jax.io.paths import PathLike
from emollama_jax.models.emotion_llama import EmotionLlama
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.runs.run import Run
from emollama_jax.sharding import make_mesh
from emollama_jax.text.prompts import FEATURES
from emollama_jax.text.tokenizers import Tokenizer
from emollama_jax.weights.emotion_llama import load_emotion_llama
from emollama_jax.weights.locate import locate
from emollama_jax.weights.model_identity import identify_model
from emollama_jax.weights.pretrained import load_base_tokenizer
from emollama_jax.weights.trained import open_trained

INPUTS = ("videos", "frames", "image_tokens")


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Turn what goes wrong within the block, and a user can mend, into a `StartError`."""
    try:
        yield
    except Exception as error:
        if (known := as_user_error(error)) is None:
            raise
        raise StartError(str(known)) from error


def make_config_mesh(config: Config) -> Mesh | None:
    """Make the mesh of the experiment, over the first devices; None for a single device.

    Raises:
        UserError: there are too few devices for it.
    """
    sizes = dataclasses.asdict(config.mesh)
    count = math.prod(sizes.values())
    if count == 1:
        return None
    return make_mesh(sizes, jax.devices()[:count] if count > 0 else None)


def check_image_file(image_encoder: Mapping[str, PathLike | None], checked: Run | None) -> None:
    """Check the file of EVA-ViT before anything large is read.

    Args:
        checked: a run that has to be trained with these files, if it was trained on frames.

    Raises:
        StartError: there is no such file.
        UserError: the run was trained with another.
    """
    if not image_encoder:
        return
    if not locate(file := image_encoder["eva_vit"]).is_file():
        raise StartError(f"weights.eva_vit: no such file: {file}; clips come as frames, which need the encoder")
    if checked:
        checked.check_image_encoder(image_encoder)


def load_clip_encoders(
    config: Config, files: Mapping[str, PathLike], *, use_random: bool, eva_vit: bool, mesh: Mesh | None
) -> Encoders:
    """Load MAE, VideoMAE and HuBERT from files, or make random ones.

    Args:
        files: by encoder; "" or a missing name leaves the encoder out, and clips have none of its features.
        use_random: untrained encoders in place of files: see `random_encoders`.
        eva_vit: with `use_random`, whether EVA-ViT is among them.

    Raises:
        StartError: a file is missing or damaged.
        UserError: an encoder's features are not of the size that the model takes.
    """
    if use_random:
        encoders = random_encoders(config, eva_vit=eva_vit, mesh=mesh)
    else:
        with starting():
            encoders = load_encoders(config, **{name: files.get(name) or None for name in FEATURES}, mesh=mesh)
    encoders.check_sizes(config)
    return encoders


def load_model(
    config: Config,
    *,
    trained: Run | PathLike | None,
    base: PathLike,
    image_encoder: Mapping[str, PathLike],
    eva_vit: EvaVit | None,
    checked: Run | None,
    any_base: bool,
    mesh: Mesh | None,
) -> tuple[EmotionLlama, Tokenizer]:
    """Load the model and its tokenizer.

    Args:
        image_encoder: the files `eva_vit` and `ln_vision`, where EVA-ViT comes from files.
        eva_vit: EVA-ViT, where it does not.
        checked: a run whose image tokens have to come from this EVA-ViT.
        any_base: whether the language model may be another than the one that `trained` was trained on.

    Raises:
        StartError: the model cannot be loaded.
        UserError: it is another EVA-ViT, or another language model.
    """
    weights = None
    with starting():
        if isinstance(trained, Run):
            weights = trained.trained_weights()
        elif trained:
            weights = open_trained(trained, alpha=config.lora.alpha, num_layers=config.llama.num_layers)
        found = identify_model(base) if weights and weights.base_identity and not any_base else None
    if found:
        weights.check_base(base, found)
    with starting():
        model, _ = load_emotion_llama(base, config, trained=weights, mesh=mesh, **image_encoder)
        tokenizer = load_base_tokenizer(base, config.llama.vocab_size)
    if eva_vit is not None:
        model = EmotionLlama(model.llama, model.projectors, eva_vit)
    if checked and model.eva_vit is not None:
        checked.check_image_tokens(model.eva_vit)
    return model, tokenizer


def load_run(run: Run, *, images: str) -> tuple[EmotionLlama, Tokenizer]:
    """Load the model of a run, on one device, and its tokenizer.

    Args:
        images: how clips keep their images: EVA-ViT is loaded for `frames`.

    Raises:
        StartError, UserError: as `load_model`.
    """
    config = run.config_for_inference()
    files = {"eva_vit": config.weights.eva_vit, "ln_vision": config.weights.ln_vision or None}
    return load_model(
        config,
        trained=run,
        base=config.weights.base,
        image_encoder=files if images == "frames" else {},
        eva_vit=None,
        checked=run,
        any_base=False,
        mesh=None,
    )


def choose_frame_rule(run: Run | None, asked: str | None, log: Callable[[str], None]) -> str:
    """Return the rule asked for, else the one of the run's training data, else `first`.

    `log` is told of a rule that was not asked for, and of one that the run was not trained on.
    """
    learnt = run.provenance.frame_rules if run else ()
    why = f"{run.path} was trained on frames by {', '.join(learnt)}" if learnt else "the default"
    if asked is not None:
        if learnt and asked not in learnt:
            log(f"warning: --frame {asked}, and {why}")
        return asked
    rule = learnt[0] if len(learnt) == 1 else "first"
    log(f"frame rule: {rule} ({why}); --frame takes another")
    return rule
