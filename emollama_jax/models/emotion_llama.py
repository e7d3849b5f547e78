"""Emotion-LLaMA: what the encoders saw and heard, as soft tokens among the text that LLaMA reads.

Axes: B rows, T positions, K clips a row, S soft tokens a clip, I x J pixels, P patches, D width.

A batch holds packed rows (see `data/packing.py`), all of whose placement is decided already:

    tokens         int32 [B, T]
    soft_index     int32 [B, T]           -1 at text, else which of the row's K S soft tokens stands here
    segment_ids    int32 [B, T]           0 is padding
    positions      int32 [B, T]           from 0 in every segment
    loss_mask      bool [B, T]            the next token is a target
    frames         uint8 [B, K, I, J, 3]  or, computed before, image_tokens float [B, K, 1 + P, EVA width]
    features       float32 [B, K, 3, 1024]  MAE, VideoMAE, HuBERT; zeros for what is missing
"""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

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


def image_tokens_of(eva_vit: EvaVitConfig, projectors: ProjectorsConfig) -> int:
    """Soft tokens that a clip's image becomes; all its soft tokens are four more.

    Raises:
        ValueError: the image's patches are no multiple of those of a token.
    """
    patches = eva_vit.grid**2
    if patches % projectors.patches_per_token:
        raise ValueError(f"patches_per_token={projectors.patches_per_token}: must divide the image's {patches} patches")
    return patches // projectors.patches_per_token


class EmotionLlama(nnx.Module):
    """The language model, the projectors, and, where batches hold frames, the encoder of the frame."""

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
        """A model with new parameters everywhere; `with_encoder=False` for batches of stored `image_tokens`."""
        image_tokens_of(eva_vit, projectors)
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

    def soft_tokens(self, batch: Mapping[str, Array]) -> Float[Array, "B KS D"]:
        """The soft tokens of each row's clips, from `features` and `frames` or `image_tokens`.

        Raises:
            ValueError: the batch holds frames and the model no encoder.
        """
        merged = lambda x: x.reshape(-1, *x.shape[2:])  # rows and clips: [B, K, ...] to [B K, ...]
        if "image_tokens" in batch:
            image = merged(batch["image_tokens"])
        elif self.eva_vit is not None:
            image = self.eva_vit.encode(merged(batch["frames"]))
        else:
            raise ValueError("the batch holds frames; make the model with its encoder, or give image_tokens")
        rows = batch["features"].shape[0]
        soft = self.projectors(image, merged(batch["features"]))
        return constrain(soft.reshape(rows, -1, soft.shape[-1]), "batch", None, None)

    def __call__(
        self, batch: Mapping[str, Array], *, dropout_key: Key[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm; `dropout_key` turns the adapters' dropout on."""
        x = self.llama.embed_tokens(batch["tokens"])
        x = place(x, self.soft_tokens(batch), batch["soft_index"])
        return self.llama(x, batch["positions"], batch["segment_ids"], dropout_key=dropout_key)


def place(
    x: Float[Array, "B T D"], soft: Float[Array, "B KS D"], soft_index: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """`x` with the row's soft tokens where `soft_index` names one."""
    picked = jnp.take_along_axis(soft, jnp.maximum(soft_index, 0)[..., None], axis=1)
    return constrain(jnp.where((soft_index >= 0)[..., None], picked.astype(x.dtype), x), "batch", None, None)
