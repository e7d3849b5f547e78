"""The encoder of VideoMAE (arXiv:2203.12602), without masking: the encoder of the motion.

Axes: B batch, t frames, I x J pixels, P patches of two frames each, D width.
"""

from dataclasses import dataclass

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from emollama_jax.fields import field
from emollama_jax.models.layers import LayerNorm
from emollama_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD, Block, PatchEmbed, VitConfig, normalize, run_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoMaeConfig(VitConfig):
    """The defaults are ViT-L/16's, as pre-trained."""

    layer_norm_eps: float = field(1e-12, gt=0)
    num_frames: int = field(16, gt=0)
    """Frames of a clip."""
    tubelet_size: int = field(2, gt=0)
    """Frames that a patch spans."""
    final_norm: bool = True
    """Whether a norm follows the last block; fine-tuned checkpoints have none."""

    def __post_init__(self):
        VitConfig.__post_init__(self)
        if self.num_frames % self.tubelet_size:
            raise ValueError(f"num_frames={self.num_frames} must be a multiple of tubelet_size={self.tubelet_size}")


class VideoMae(nnx.Module):
    """The encoder; the positions of its patches are fixed sines."""

    def __init__(self, config: VideoMaeConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.patches = PatchEmbed(config, frames=config.tubelet_size, rngs=rngs)
        self.layers = Block(config, key_bias=False, norm_first=True, rngs=rngs)
        norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, dtype=config.param_dtype)
        self.final_norm = norm if config.final_norm else None

    def __call__(self, pixels: Float[Array, "B t I J 3"]) -> Float[Array, "B P D"]:
        """Tokens, float32, of frames normalised with ImageNet's statistics, in the order of time, rows, columns."""
        x = self.patches(pixels.astype(self.config.compute_dtype))
        x = run_blocks(self.layers, x + sine_positions(*x.shape[1:]).astype(x.dtype)).astype("float32")
        return x if self.final_norm is None else self.final_norm(x)

    def encode(self, clips: UInt8[Array, "B t I J 3"]) -> Float[Array, "B D"]:
        """One vector for each clip of RGB frames: the mean of all tokens."""
        return self(normalize(clips, IMAGENET_MEAN, IMAGENET_STD)).mean(axis=1)


def sine_positions(length: int, width: int) -> Float[np.ndarray, "P D"]:
    """Sine (even columns) and cosine (odd) of each position at falling frequencies (arXiv:1706.03762), float32."""
    frequencies = 10000.0 ** -(np.arange(width) // 2 * 2 / width)
    angles = np.arange(length)[:, None] * frequencies
    return np.where(np.arange(width) % 2, np.cos(angles), np.sin(angles)).astype(np.float32)
