"""The tensors that are exported of a trained model."""

import numpy as np

from emollama_jax.models.emotion_llama import EmotionLlama
from emollama_jax.models.lora import adapter_targets
from emollama_jax.weights.engine import export
from emollama_jax.weights.trained import trained_table


def trained_tensors(model: EmotionLlama) -> dict[str, np.ndarray]:
    """The model's adapters and projectors under the reference's names."""
    return dict(export(model, trained_table(adapter_targets(model))))
