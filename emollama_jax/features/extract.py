"""Extraction: records with features, out of videos. Clips are read in worker processes while the devices encode those
before.

    encoders = load_encoders(config, mae="vit-mae-large", videomae="videomae-large", hubert="chinese-hubert-large")
    recipe = extraction_recipe(config, encoders, labels=MERR, frame_rule="peak")
    prepared = prepare("merr", annotations, Path("data"), recipe, extraction_part_maker(config, encoders, workers=16))

Axes: F feature size.
"""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Bool, Float

from emollama_jax.config import Config
from emollama_jax.data.annotation_files import FEATURE_FOLDERS
from emollama_jax.data.parts import EncodedClips, PartMaker
from emollama_jax.data.recipe import Recipe
from emollama_jax.features.encoders import Encoders
from emollama_jax.io.atomic import write_bytes
from emollama_jax.io.paths import PathLike, as_path
from emollama_jax.io.stopwatch import Stopwatch
from emollama_jax.media.clip_reader import ClipRead

LONGEST_NAME = 255  # bytes that file systems take


def extraction_recipe(
    config: Config,
    encoders: Encoders,
    *,
    labels: Sequence[str],
    frame_rule: str,
    subtitle_sources: Sequence[str] = (),
    subtitle_language: str = "",
) -> Recipe:
    """Return how records are made with these encoders; EVA-ViT among them means image tokens."""
    return Recipe(
        labels=tuple(labels),
        frame_rule=frame_rule,
        image_storage="frame" if encoders.eva_vit is None else "image_tokens",
        size=config.eva_vit.image_size,
        image_tokens_shape=(1 + config.eva_vit.grid**2, config.eva_vit.hidden_size),
        feature_size=config.projectors.feature_size,
        encoders=encoders.fingerprints(config),
        subtitle_sources=tuple(subtitle_sources),
        subtitle_language=subtitle_language,
    )


def extraction_part_maker(
    config: Config,
    encoders: Encoders,
    *,
    workers: int = 1,
    batch_size: int = 32,
    npy: PathLike | None = None,
    **options: Any,
) -> PartMaker:
    """Return what makes the parts of a data set with these encoders.

    Args:
        workers: processes that read clips; 0 is one that reads each when its turn comes.
        batch_size: images that are on the devices at once.
        npy: a folder that gets {name}.npy of each feature too, in the reference's folders.
        options: further fields of `PartMaker`.

    Raises:
        UserError: an encoder's features are not of the model's size.
    """
    encoders.check_sizes(config)
    clock = Stopwatch()
    return PartMaker(
        clip_config=config.clip,
        read_spec=encoders.read_spec(config.eva_vit.image_size),
        encode=ClipEncoder(encoders, config.projectors.feature_size, batch_size, npy and as_path(npy), clock),
        workers=workers,
        clock=clock,
        **options,
    )


@dataclass(frozen=True)
class ClipEncoder:
    """Runs the encoders over the clips of a part, as a `PartMaker` asks for it.

    Attributes:
        clock: measures each encoder.
    """

    encoders: Encoders
    feature_size: int
    batch_size: int = 32
    npy: epath.Path | None = None
    clock: Stopwatch = field(default_factory=Stopwatch)

    def __call__(self, reads: Sequence[ClipRead]) -> EncodedClips:
        media = [read.media for read in reads]
        features, has = self.encoders.features(media, self.feature_size, self.batch_size, self.clock.add)
        if self.npy:
            for read, vectors, present in zip(reads, features, has, strict=True):
                _write_npy(self.npy, read.name, vectors, present)
        if self.encoders.eva_vit is None:
            return EncodedClips(features, has)
        with self.clock("eva_vit"):
            tokens = self.encoders.image_tokens(media, self.batch_size)
        return EncodedClips(features, has, tokens)


def _write_npy(folder: epath.Path, name: str, features: Float[np.ndarray, "3 F"], has: Bool[np.ndarray, " 3"]) -> None:
    for names, vector, present in zip(FEATURE_FOLDERS, features, has, strict=True):
        if present:
            array = io.BytesIO()
            np.save(array, vector)
            if len(os.fsencode(file := f"{name}.npy")) > LONGEST_NAME:
                logging.warning("no .npy of %s: the name is too long for a file", name)
                continue
            write_bytes(folder / names[0] / file, array.getvalue())
