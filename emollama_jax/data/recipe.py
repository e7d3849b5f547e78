"""How the records of a data set are made, and by what it is known again."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tensorflow_datasets as tfds

from emollama_jax.data.annotations import Clip
from emollama_jax.data.clip_files import FEATURE_SIZE
from emollama_jax.data.records import features_dict
from emollama_jax.media.clip import check_frame_rule
from emollama_jax.text.labels import check_labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How records are made; it is written into the data set's metadata."""

    labels: tuple[str, ...]
    """The emotions; a record keeps the index of its own."""
    frame_rule: str = "first"
    """Which frame is kept: first, middle, peak, or a number from 0."""
    image_storage: str = "frame"
    """What is kept of it: "frame" or "image_tokens"."""
    size: int = 448
    """Pixels along each side of the frame."""
    image_tokens_shape: tuple[int, int] = (1025, 1408)
    """[T, D] of EVA-ViT's tokens of a frame."""
    feature_size: int = FEATURE_SIZE
    """Numbers of a feature."""
    encoders: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the encoders, by name: of the features, without those that are read from files, and of the image
    tokens (`eva_vit`)."""
    subtitle_sources: tuple[str, ...] = ()
    """Where the subtitle of a clip is looked for whose list has none (see `media.subtitles.SOURCES`)."""
    subtitle_language: str = ""
    """Of subtitle files and tracks, as in "en"; "" takes any."""

    def __post_init__(self):
        check_frame_rule(self.frame_rule)
        if self.labels:
            check_labels(self.labels)

    def label_index(self, label: str | None) -> int:
        """Return the index among the labels, -1 for none of them."""
        return self.labels.index(label) if label in self.labels else -1

    def features(self) -> tfds.features.FeaturesDict:
        """Return the TFDS features of the records."""
        shape = self.image_tokens_shape
        return features_dict(self.image_storage, feature_size=self.feature_size, image_tokens_shape=shape)

    def fingerprint(self, clips: Sequence[Clip]) -> str:
        """Return the fingerprint of the recipe and all that it is applied to, files by their name, size and time."""
        encoders = dict(self.encoders)
        # Under the names of the first version, so that a data set that it prepared is found again.
        first = {
            "labels": self.labels,
            "frame": self.frame_rule,
            "image": self.image_storage,
            "size": self.size,
            "encoder": encoders.pop("eva_vit", ""),
            "image_tokens_shape": self.image_tokens_shape,
            "feature_size": self.feature_size,
            "encoders": encoders,
            "subtitles": self.subtitle_sources,
        }
        if self.subtitle_language:
            first["subtitle_language"] = self.subtitle_language
        digest = hashlib.sha256(json.dumps(first).encode())
        for clip in clips:
            files = {"video": _stamp(clip.video), "openface": _stamp(clip.openface)}
            known = dataclasses.asdict(clip) | files | {"features": [*map(_stamp, clip.features)]}
            digest.update(json.dumps(known).encode())
        return digest.hexdigest()[:16]


def _stamp(path: Path | None) -> tuple[str, int, int] | None:
    if path is None:
        return None
    try:
        status = path.stat()
    except OSError:  # gone, or a link that leads nowhere: the clip will be put aside
        return path.name, -1, -1
    return path.name, status.st_size, status.st_mtime_ns
