"""The typed batch: what the pipeline makes, a step takes, and every array's shape and dtype.

Axes: B rows, T positions, K clips a row, S soft tokens a clip, I x I pixels, N tokens of EVA-ViT, W their width, F
feature size.
"""

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float16, Float32, Int32, UInt8

from emollama_jax.config import Config
from emollama_jax.models.emotion_llama import num_image_tokens
from emollama_jax.models.projectors import NUM_FEATURE_TOKENS
from emollama_jax.sharding import AxisRules, partition_spec

Images = Literal["frames", "image_tokens"]


@jax.tree_util.register_dataclass
@typing.no_type_check  # trees of it also hold specs, shardings and what JAX puts in place of arrays
@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Packed rows of clips; NumPy arrays on the host, global arrays on a mesh, or `jax.ShapeDtypeStruct`s.

    Rows of text alone have no clips: the fields from `features` on are None.
    """

    tokens: Int32[Array, "B T"]
    """Ids; 0 at soft tokens and padding."""
    soft_index: Int32[Array, "B T"]
    """Index among the row's K S soft tokens; -1 at text and padding."""
    segment_ids: Int32[Array, "B T"]
    """k + 1 at the tokens of the row's k-th clip; 0 is padding."""
    positions: Int32[Array, "B T"]
    """From 0 in every segment."""
    loss_weights: Float32[Array, "B T"]
    """Weight in the loss of predicting the *next* token; 0 where that is no target (`data/packing.py`)."""
    features: Float32[Array, "B K 3 F"] | None = None
    """MAE, VideoMAE, HuBERT; zeros for what is missing."""
    clip_mask: Bool[Array, "B K"] | None = None
    """Which of a row's places hold a clip."""
    has_image: Bool[Array, "B K"] | None = None
    """Whose image is seen: of the others the projectors get zeros for EVA-ViT's tokens. None: all."""
    clip: Int32[Array, "B K"] | None = None
    """Number of the clip among all records of the data sets; -1 for none."""
    frames: UInt8[Array, "B K I I 3"] | None = None
    """Images for EVA-ViT; None where `image_tokens` are stored."""
    image_tokens: Float16[Array, "B K N W"] | None = None
    """EVA-ViT's tokens, the class token first; None where there are `frames`."""


def batch_spec(config: Config, *, images: Images, rows: int | None = None, sequence_length: int | None = None) -> Batch:
    """Describe a batch of `config` as a Batch of `jax.ShapeDtypeStruct`s.

    Args:
        images: which of `frames` and `image_tokens` it holds; the other is None.
        rows: B; default: `data.batch_rows`.
        sequence_length: T; default: `data.sequence_length`.
    """
    rows = config.data.batch_rows if rows is None else rows
    length = config.data.sequence_length if sequence_length is None else sequence_length
    clips, eva_vit = config.data.clips_per_row, config.eva_vit
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype)
    is_frames = images == "frames"
    return Batch(
        tokens=array(np.int32, length),
        soft_index=array(np.int32, length),
        segment_ids=array(np.int32, length),
        positions=array(np.int32, length),
        loss_weights=array(np.float32, length),
        features=array(np.float32, clips, 3, config.projectors.feature_size),
        clip_mask=array(np.bool_, clips),
        has_image=array(np.bool_, clips) if config.data.modality_dropout else None,
        clip=array(np.int32, clips),
        frames=array(np.uint8, clips, eva_vit.image_size, eva_vit.image_size, 3) if is_frames else None,
        image_tokens=None if is_frames else array(np.float16, clips, 1 + eva_vit.grid**2, eva_vit.hidden_size),
    )


def soft_tokens_per_clip(config: Config) -> int:
    """Count the soft tokens S of a clip."""
    return num_image_tokens(config.eva_vit, config.projectors) + NUM_FEATURE_TOKENS


def batch_sharding(mesh: Mesh, rules: AxisRules, shape: Sequence[int]) -> NamedSharding:
    """Make the sharding of a batch's array [B, ...]: its rows are split over the mesh."""
    axes = ("batch", *[None] * (len(shape) - 1))
    return NamedSharding(mesh, partition_spec(axes, shape, dict(mesh.shape), rules))
