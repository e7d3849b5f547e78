"""The encoder of MAE (arXiv:2111.06377), without masking: the encoder of the face.

Axes: B batch, I x J pixels, T tokens (the class token, then the patches row by row), D width.
"""

from dataclasses import dataclass

from flax import nnx
from jaxtyping import Array, Float, UInt8

from emollama_jax.fields import field
from emollama_jax.models.layers import LayerNorm
from emollama_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD, Block, ImageEmbed, VitConfig, normalize, run_blocks

POOLS = ("mean", "cls")


@dataclass(frozen=True, slots=True, kw_only=True)
class MaeConfig(VitConfig):
    """The defaults are ViT-L/16's."""

    layer_norm_eps: float = field(1e-12, gt=0)
    pool: str = field("mean", choices=POOLS)
    """How a face's tokens become one vector: mean (of its patches) or cls (the class token)."""


class Mae(nnx.Module):
    """The encoder with its final norm."""

    def __init__(self, config: MaeConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = ImageEmbed(config, rngs=rngs)
        self.layers = Block(config, key_bias=True, norm_first=True, rngs=rngs)
        self.final_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, dtype=config.param_dtype)

    def __call__(self, pixels: Float[Array, "B I J 3"]) -> Float[Array, "B T D"]:
        """Tokens, float32, of images normalised with ImageNet's statistics."""
        return self.final_norm(run_blocks(self.layers, self.embed(pixels)).astype("float32"))

    def encode(self, faces: UInt8[Array, "B I J 3"]) -> Float[Array, "B D"]:
        """One vector for each RGB face; a clip's is the mean over its frames."""
        tokens = self(normalize(faces, IMAGENET_MEAN, IMAGENET_STD))
        return tokens[:, 0] if self.config.pool == "cls" else tokens[:, 1:].mean(axis=1)
