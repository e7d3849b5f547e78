"""A clip as arrays, and the clip without some of its modalities.

Axes: F feature size, I x I pixels, P image tokens, W their width.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from emollama_jax.config import Config
from emollama_jax.data.modalities import features_of
from emollama_jax.data.records import decode_frame


@dataclass(frozen=True)
class ClipInput:
    """A clip as the model takes it, with the image as a frame or as EVA-ViT's tokens of one."""

    name: str
    subtitle: str
    features: Float[np.ndarray, "3 F"]
    """MAE, VideoMAE, HuBERT; zeros for what is missing."""
    has_feature: Bool[np.ndarray, " 3"]
    frame: UInt8[np.ndarray, "I I 3"] | None = None
    image_tokens: Float[np.ndarray, "P W"] | None = None

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "ClipInput":
        """Make the clip of a record of a prepared data set (`data/records.py`)."""
        return cls(
            name=record["name"],
            subtitle=record["subtitle"],
            features=np.asarray(record["features"], np.float32),
            has_feature=np.asarray(record["has_feature"], bool),
            frame=decode_frame(record["frame"]) if "frame" in record else None,
            image_tokens=record.get("image_tokens"),
        )

    def restricted(self, modalities: str, config: Config) -> "ClipInput":
        """Return the clip without the modalities that are not named."""
        has = self.has_feature & features_of(modalities)
        changes: dict[str, Any] = {"has_feature": has, "features": np.where(has[:, None], self.features, 0)}
        if "T" not in modalities:
            changes["subtitle"] = ""
        if "V" not in modalities:
            shape = (1 + config.eva_vit.grid**2, config.eva_vit.hidden_size)
            changes |= {"frame": None, "image_tokens": np.zeros(shape, np.float16)}
        return dataclasses.replace(self, **changes)
