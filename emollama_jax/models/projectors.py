"""Trained linear maps from the encoders' outputs to soft tokens of the language model.

Axes: N clips, T image tokens (the class token, then the patches), W their width, F feature size, S soft tokens, D
width of the language model.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from emollama_jax.fields import check_fields, field
from emollama_jax.models.layers import Linear
from emollama_jax.sharding import constrain

PROJECTORS = ("image_proj", "mae_proj", "videomae_proj", "hubert_proj", "cls_proj")
NUM_FEATURE_TOKENS = 4  # soft tokens of a clip beside the image's: MAE, VideoMAE, HuBERT, the image's class token


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectorsConfig:
    """Sizes of the inputs of the soft tokens; the defaults are those of the released Emotion-LLaMA."""

    patches_per_token: int = field(4, ge=1)
    """Consecutive patches, row by row, that one image token is made of."""
    feature_size: int = field(1024, ge=1)
    """Width of the MAE, VideoMAE and HuBERT vectors."""

    def __post_init__(self):
        check_fields(self)


class Projectors(nnx.Module):
    """One linear map with a bias for each kind of soft token; float32, computed in the dtype asked for."""

    def __init__(self, config: ProjectorsConfig, *, image_width: int, width: int, compute_dtype: str, rngs: nnx.Rngs):
        self.config = config
        self.compute_dtype = compute_dtype

        def linear(inputs: int) -> Linear:
            common = {"axes": (None, "embed"), "kernel_dtype": "float32", "bias_dtype": "float32", "rngs": rngs}
            return Linear(inputs, width, init_std=(3 * inputs) ** -0.5, **common)  # the variance of torch's default

        self.image_proj = linear(config.patches_per_token * image_width)
        self.mae_proj = linear(config.feature_size)
        self.videomae_proj = linear(config.feature_size)
        self.hubert_proj = linear(config.feature_size)
        self.cls_proj = linear(image_width)

    def __call__(self, image: Float[Array, "N T W"], features: Float[Array, "N 3 F"]) -> Float[Array, "N S D"]:
        """Soft tokens: the image's, then MAE, VideoMAE, HuBERT and the image's class token.

        Args:
            image: EVA-ViT's tokens, the class token first.
            features: MAE's, VideoMAE's and HuBERT's vectors; zeros for what a clip does not have.
        """
        image, features = image.astype(self.compute_dtype), features.astype(self.compute_dtype)
        clips, _, width = image.shape
        patches = image[:, 1:].reshape(clips, -1, self.config.patches_per_token * width)
        tokens = [
            self.image_proj(patches),
            self.mae_proj(features[:, 0:1]),
            self.videomae_proj(features[:, 1:2]),
            self.hubert_proj(features[:, 2:3]),
            self.cls_proj(image[:, :1]),
        ]
        return constrain(jnp.concatenate(tokens, axis=1), "batch", None, None)
