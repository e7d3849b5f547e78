"""What answers are answers of, by fingerprints, and whether a model knows the clips it is given as it learnt them: by
encoders and frame rule."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from emollama_jax.config import Config, values_affecting
from emollama_jax.errors import UserError
from emollama_jax.io.checksums import file_digest
from emollama_jax.models.emotion_llama import EmotionLlama, is_trainable
from emollama_jax.models.eva_vit import EvaVit
from emollama_jax.text.prompts import FEATURES
from emollama_jax.weights.base_checkpoint import fingerprint_of, is_base_checkpoint, read_manifest
from emollama_jax.weights.engine import param_values
from emollama_jax.weights.runs import checkpoint_of, is_run, read_meta


def identity_of(
    config: Config, model: EmotionLlama, base: str | Path, *, encoders: Mapping[str, str], **settings: Any
) -> dict[str, Any]:
    """Model, experiment and settings in JSON's types, for `open_output`.

    Args:
        base: the file or folder that the language model came from.
        encoders: fingerprints of what made the features.
    """
    weights = {
        "base": read_manifest(base)["fingerprint"]
        if is_base_checkpoint(base)
        else _fingerprint(model.llama, nnx.Not(is_trainable)),
        "trained": _fingerprint(model, is_trainable),
    }
    if model.eva_vit is not None:
        weights["eva_vit"] = _fingerprint(model.eva_vit)
    return {
        "weights": weights,
        "encoders": dict(encoders),
        "config": values_affecting(config, "prediction"),
        **settings,
    }


def _fingerprint(module: nnx.Module, *filters: Any) -> str:
    return fingerprint_of(param_values(nnx.state(module, *filters)))


def check_encoders(trained: str | Path, found: Mapping[str, str], *, all_known: bool) -> None:
    """That the features are of the encoders that a training run learnt from, as far as the run knows them.

    Args:
        trained: a run or one of its checkpoints; other files do not say.
        found: the fingerprints of those that are used now.
        all_known: whether a feature that is not in `found` is missing, rather than of an unknown encoder.

    Raises:
        UserError: they are not.
    """
    _compare(trained, _learnt(trained).get("encoders", {}), found, all_known=all_known)


def check_image_tokens(trained: str | Path, eva_vit: EvaVit) -> None:
    """The same of the encoder of frames, where the run was trained on stored image tokens: by its parameters.

    Raises:
        UserError: they were made by another one.
    """
    known = _learnt(trained).get("encoders", {})
    if "eva_vit" in known:
        _compare(trained, known, {"eva_vit": _fingerprint(eva_vit)}, all_known=False)


def _compare(trained: str | Path, known: Mapping[str, str], found: Mapping[str, str], *, all_known: bool) -> None:
    missing = dict.fromkeys(FEATURES, "no encoder") if all_known else {}
    for name, now in (missing | dict(found)).items():
        if name in known and now != known[name]:
            raise UserError(
                f"{trained} was trained on {name} features of {known[name]}, and here they are of {now}; give that "
                f"encoder (--{name.replace('_', '-')}), extract the data again with it, or answer all the same with "
                "--any-encoders"
            )


def check_image_encoder(trained: str | Path, file: str | Path) -> None:
    """The same of the encoder of frames, where the run was trained on frames: by its file.

    Raises:
        UserError: it is another one.
    """
    known = _learnt(trained).get("encoder")
    if known is None:
        return
    if file_digest(file) != known["eva_vit"]:
        raise UserError(
            f"--eva-vit: {file} is not the encoder that {trained} was trained with; give that one, or answer all the "
            "same with --any-encoders"
        )


def learnt_frame_rules(trained: str | Path) -> list[str]:
    """The frame rules of the data that a training run learnt from, none where that is not known."""
    return _learnt(trained).get("frames") or []


def _learnt(trained: str | Path) -> dict[str, Any]:
    """What a training run or a checkpoint of one says it was trained on; nothing for other files."""
    return read_meta(checkpoint_of(trained)) if is_run(trained) else {}
