"""Emotion-LLaMA: LLaMA over text tokens and the soft tokens that projectors make of the encoders' outputs.

The positions of soft tokens are decided before (`data/packing.py`): the model projects the clips, gathers their soft
tokens by `soft_index`, and runs LLaMA with segment-masked causal attention.

Axes: B rows, T positions, K clips a row, S soft tokens a clip, I x I pixels, N tokens of EVA-ViT, W their width, F
feature size, D model width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from emollama_jax.models.eva_vit import EvaVit, EvaVitConfig
from emollama_jax.models.llama import Llama, LlamaConfig
from emollama_jax.models.lora import LoRAConfig, is_adapter
from emollama_jax.models.projectors import PROJECTORS, Projectors, ProjectorsConfig
from emollama_jax.sharding import constrain

TRAINABLE = ("lora", *PROJECTORS)


def is_trainable(path: tuple, variable: nnx.Variable, parts: tuple[str, ...] = TRAINABLE) -> bool:
    """Whether a parameter is trained: the one place that decides, an NNX filter for `nnx.split` and `nnx.state`.

    `parts` (see `Config.trainable`) are all by default; for fewer give `functools.partial(is_trainable, parts=...)`.
    """
    if is_adapter(path, variable):
        return "lora" in parts
    return "projectors" in path and not set(parts).isdisjoint(path)


def num_image_tokens(eva_vit: EvaVitConfig, projectors: ProjectorsConfig) -> int:
    """Count the image tokens of a clip; its soft tokens are these and NUM_FEATURE_TOKENS.

    Raises:
        ValueError: the number of patches is not a multiple of `projectors.patches_per_token`.
    """
    patches = eva_vit.grid**2
    if patches % projectors.patches_per_token:
        raise ValueError(f"patches_per_token={projectors.patches_per_token}: must divide the image's {patches} patches")
    return patches // projectors.patches_per_token


class EmotionLlama(nnx.Module):
    """The language model, the projectors, and the encoder of the frame unless `image_tokens` are given."""

    def __init__(self, llama: Llama, projectors: Projectors, eva_vit: EvaVit | None = None):
        self.llama = llama
        self.projectors = projectors
        self.eva_vit = eva_vit

    @classmethod
    def init(
        cls,
        llama: LlamaConfig,
        lora: LoRAConfig,
        projectors: ProjectorsConfig,
        eva_vit: EvaVitConfig,
        *,
        with_encoder: bool = True,
        rngs: nnx.Rngs,
    ) -> "EmotionLlama":
        """Make a model of new parameters; `with_encoder=False` for batches of stored `image_tokens`."""
        num_image_tokens(eva_vit, projectors)
        return cls(
            Llama(llama, lora, rngs=rngs),
            Projectors(
                projectors,
                image_width=eva_vit.hidden_size,
                width=llama.hidden_size,
                compute_dtype=llama.compute_dtype,
                rngs=rngs,
            ),
            EvaVit(eva_vit, rngs=rngs) if with_encoder else None,
        )

    def soft_tokens(
        self,
        features: Float[jax.Array | np.ndarray, "B K 3 F"],
        *,
        frames: UInt8[jax.Array | np.ndarray, "B K I I 3"] | None = None,
        image_tokens: Float[jax.Array | np.ndarray, "B K N W"] | None = None,
        has_image: Bool[jax.Array | np.ndarray, "B K"] | None = None,
    ) -> Float[Array, "B KS D"]:
        """Project each row's clips to soft tokens, from `image_tokens` or from the `frames` that are encoded to them.

        Args:
            has_image: of which clips the image is used; of the others it is zeros. Default: of all.

        Raises:
            ValueError: there are frames and the model has no encoder, or neither is given.
        """
        merged = lambda x: x.reshape(-1, *x.shape[2:])  # rows and clips: [B, K, ...] to [B K, ...]
        if image_tokens is not None:
            image = merged(image_tokens)
        elif frames is not None and self.eva_vit is not None:
            image = self.eva_vit.encode(merged(frames))
        elif frames is not None:
            raise ValueError("the batch holds frames; make the model with its encoder, or give image_tokens")
        else:
            raise ValueError("the batch holds no clips; give frames or image_tokens")
        if has_image is not None:
            image = jnp.where(merged(has_image)[:, None, None], image, 0)
        soft = self.projectors(image, merged(features))
        return constrain(soft.reshape(features.shape[0], -1, soft.shape[-1]), "batch", None, None)

    def __call__(
        self,
        tokens: Int[jax.Array | np.ndarray, "B T"],
        soft: Float[Array, "B KS D"],
        soft_index: Int[jax.Array | np.ndarray, "B T"],
        positions: Int[jax.Array | np.ndarray, "B T"],
        segment_ids: Int[jax.Array | np.ndarray, "B T"],
        *,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """Compute hidden states after the final norm; `dropout_key` turns the adapters' dropout on.

        Args:
            soft: each row's soft tokens (`soft_tokens`).
            soft_index: index among the row's soft tokens, -1 at text.
            positions: from 0 in every segment.
            segment_ids: 0 is padding; a token sees those before it in its own segment.
        """
        x = insert_soft_tokens(self.llama.embed_tokens(tokens), soft, soft_index)
        return self.llama(x, positions, segment_ids, dropout_key=dropout_key)


def insert_soft_tokens(
    x: Float[Array, "B T D"], soft: Float[Array, "B N D"], soft_index: Int[jax.Array | np.ndarray, "B T"]
) -> Float[Array, "B T D"]:
    """Replace the embeddings `x` by the row's soft tokens where `soft_index` names one (-1 at text)."""
    picked = jnp.take_along_axis(soft, jnp.maximum(soft_index, 0)[..., None], axis=1)
    return constrain(jnp.where((soft_index >= 0)[..., None], picked.astype(x.dtype), x), "batch", None, None)
