"""What predictions depend on, by fingerprints: the weights, the experiment and the encoders."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from emollama_jax.config import Config, values_affecting
from emollama_jax.io.paths import PathLike
from emollama_jax.models.emotion_llama import EmotionLlama, is_trainable
from emollama_jax.weights.base_checkpoint import fingerprint_of, is_base_checkpoint, read_manifest
from emollama_jax.weights.engine import param_values


def identity_of(
    config: Config, model: EmotionLlama, base: PathLike, *, encoders: Mapping[str, str], **settings: Any
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
