"""EVA-ViT-G (arXiv:2211.07636), the encoder of the whole frame.

Axes: B batch, I x J pixels, T tokens (the class token, then the patches row by row), D width.
"""

from dataclasses import dataclass

from flax import nnx
from jaxtyping import Array, Float, UInt8

from emollama_jax.fields import field
from emollama_jax.models.layers import LayerNorm
from emollama_jax.models.vit import Block, ImageEmbed, VitConfig, normalize, run_blocks

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaVitConfig(VitConfig):
    """The defaults are the released Emotion-LLaMA's: 39 of the checkpoint's layers, at 448 pixels."""

    hidden_size: int = field(1408, gt=0)
    intermediate_size: int = field(6144, gt=0)
    num_layers: int = field(39, gt=0)
    image_size: int = field(448, gt=0)
    patch_size: int = field(14, gt=0)
    output_norm_eps: float = field(1e-5, gt=0)
    """Epsilon of `ln_vision`, the norm of the tokens that the language model's projection sees."""


class EvaVit(nnx.Module):
    """The encoder with `ln_vision` behind it. Keys have no bias, and no norm follows the last block but that one."""

    def __init__(self, config: EvaVitConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = ImageEmbed(config, rngs=rngs)
        self.layers = Block(config, key_bias=False, norm_first=True, rngs=rngs)
        self.ln_vision = LayerNorm(config.hidden_size, epsilon=config.output_norm_eps, dtype=config.param_dtype)

    def __call__(self, pixels: Float[Array, "B I J 3"]) -> Float[Array, "B T D"]:
        """Tokens, float32, of images normalised with CLIP's statistics."""
        return self.ln_vision(run_blocks(self.layers, self.embed(pixels)).astype("float32"))

    def encode(self, frames: UInt8[Array, "B I J 3"]) -> Float[Array, "B T D"]:
        """The tokens of RGB frames."""
        return self(normalize(frames, CLIP_MEAN, CLIP_STD))
