"""From videos to records with features: clips are read in worker processes while the devices encode those before.

    encoders = load_encoders(config, mae="vit-mae-large", videomae="videomae-large", hubert="chinese-hubert-large")
    recipe = extraction_recipe(config, encoders, labels=MERR, frame="peak")
    prepared = prepare(Merr, annotations, Path("data"), recipe, Extraction(config, encoders, workers=16))

Axes: F feature size.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from emollama_jax.config import Config
from emollama_jax.data.annotations import FEATURE_FOLDERS, Clip
from emollama_jax.data.preparation import (
    Recipe,
    peak_frame_index,
    problem_of,
    read_features,
    record_of,
    video_of,
    write_part,
)
from emollama_jax.data.records import encode_frame
from emollama_jax.errors import UserError
from emollama_jax.features.encode import encode_images
from emollama_jax.features.encoders import Encoders
from emollama_jax.io.atomic import atomic_file
from emollama_jax.io.worker_pool import map_ahead
from emollama_jax.media.clip import ClipConfig, ClipMedia, ReadSpec, read_clip
from emollama_jax.media.subtitles import Transcribe, subtitle_of

CLIPS_PER_PART = 16


def extraction_recipe(
    config: Config, encoders: Encoders, *, labels: Sequence[str], frame: str, subtitles: Sequence[str] = ()
) -> Recipe:
    """How records are made with these encoders; EVA-ViT among them means image tokens."""
    fingerprints = encoders.fingerprints(config)
    eva_vit = fingerprints.pop("eva_vit", "")
    return Recipe(
        labels=tuple(labels),
        frame=frame,
        image="image_tokens" if eva_vit else "frame",
        size=config.eva_vit.image_size,
        encoder=eva_vit,
        image_tokens_shape=(1 + config.eva_vit.grid**2, config.eva_vit.hidden_size),
        feature_size=config.projectors.feature_size,
        encoders=fingerprints,
        subtitles=tuple(subtitles),
    )


@dataclass
class Extraction:
    """Makes the parts of a data set (see `data/preparation.py`) out of its videos.

    A feature whose encoder is not given comes from the clip's file, if it has one.

    Attributes:
        workers: processes that read clips; 0 is none beside this one.
        batch_size: images that are on the devices at once.
        share: (i, n): this process makes every n-th part, from the i-th on.
        transcribe: listens, where the recipe's subtitles are looked for in the speech.
        npy: a folder that gets {name}.npy of each feature too, in the reference's folders.
        on_part: is told how many clips are done, and how many of them were put aside.
        seconds: spent so far by each kind of work: decode, face and sound by all workers together, each encoder, and
            `wait`, for clips that were not read yet.
    """

    config: Config
    encoders: Encoders
    workers: int = 1
    batch_size: int = 32
    share: tuple[int, int] = (0, 1)
    transcribe: Transcribe | None = None
    npy: Path | None = None
    on_part: Callable[[int, int], None] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, clips: Sequence[Clip], recipe: Recipe, folder: Path) -> list[Path]:
        """Makes those of the parts that are this process's and not there yet, and returns the paths of all."""
        folder.mkdir(parents=True, exist_ok=True)
        starts = range(0, len(clips), CLIPS_PER_PART)
        parts = [(folder / f"extracted-{i:06d}.array_record", clips[i : i + CLIPS_PER_PART]) for i in starts]
        index, count = self.share
        todo = [(path, some) for path, some in parts[index::count] if not path.exists()]
        wanted = self.encoders.wanted(recipe.size)
        jobs = (_Job(clip, recipe, self.config.clip, wanted) for _, some in todo for clip in some)
        ahead = max(CLIPS_PER_PART, 2 * self.workers)  # the next part is read while this one is encoded
        with contextlib.closing(map_ahead(_read, jobs, self.workers, ahead)) as found:
            for path, some in todo:
                start = time.perf_counter()
                read = list(itertools.islice(found, len(some)))
                self._count("wait", time.perf_counter() - start)
                self._write(path, some, read, recipe)
        return [path for path, _ in parts]

    def _write(self, path: Path, clips: Sequence[Clip], found: Sequence["_Read | Exception"], recipe: Recipe) -> None:
        """A part, of the clips and what was read of each."""
        good, problems = [], []
        for clip, read in zip(clips, found, strict=True):
            try:
                good.append((self._with_subtitle(clip, read, recipe), read))
            except UserError as error:
                problems.append(problem_of(clip, error))
        records, clip_info = [], []
        if good:
            media = [read.media for _, read in good]
            features, has = self.encoders.features(media, recipe.feature_size, self.batch_size, self._count)
            images = self._images(media, recipe)
            serialize = recipe.features().serialize_example
            for i, (clip, read) in enumerate(good):
                if self.npy:
                    _write_npy(self.npy, clip.name, features[i], has[i])
                vectors = np.where(has[i, :, None], features[i], read.features)
                records.append(serialize(record_of(clip, recipe, vectors, has[i] | read.has_feature) | images[i]))
                clip_info.append(
                    {"name": clip.name, "split": clip.split, **read.media.clip_info, "subtitle": clip.subtitle}
                )
                for kind, seconds in read.media.seconds.items():
                    self._count(kind, seconds)
        with atomic_file(path) as partial:
            write_part(partial, records, problems=problems, clip_info=clip_info)
        if self.on_part:
            self.on_part(len(clips), len(problems))

    def _with_subtitle(self, clip: Clip, read: "_Read | Exception", recipe: Recipe) -> Clip:
        """The clip with its subtitle. Raises UserError where the clip could not be read."""
        if isinstance(read, BrokenProcessPool):
            raise UserError(
                f"{clip.video}: the process that decoded it died; it is damaged, or does not fit into memory"
            )
        if isinstance(read, Exception):
            raise read
        if not read.subtitle and "speech" in recipe.subtitles:
            return dataclasses.replace(clip, subtitle=subtitle_of(clip.video, recipe.subtitles, self.transcribe).text)
        return dataclasses.replace(clip, subtitle=read.subtitle)

    def _images(self, media: Sequence[ClipMedia], recipe: Recipe) -> list[dict[str, Any]]:
        if recipe.image == "frame":
            return [{"frame": encode_frame(one.frame)} for one in media]
        start = time.perf_counter()
        frames = np.stack([one.frame for one in media])
        tokens = encode_images(self.encoders.eva_vit, frames, batch_size=max(1, self.batch_size // 4))
        self._count("eva_vit", time.perf_counter() - start)
        return [{"image_tokens": one.astype(np.float16)} for one in tokens]

    def _count(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0) + seconds


@dataclass(frozen=True)
class _Job:
    clip: Clip
    recipe: Recipe
    config: ClipConfig
    wanted: ReadSpec


@dataclass(frozen=True)
class _Read:
    """What a worker found out about a clip: by decoding, from its feature files, and about what is said."""

    media: ClipMedia
    features: Float[np.ndarray, "3 F"]
    has_feature: Bool[np.ndarray, " 3"]
    subtitle: str


def _read(job: _Job) -> _Read | UserError:
    """In a worker: the clip, or why it cannot be read. Speech is left to the process that has the recogniser."""
    clip, recipe = job.clip, job.recipe
    try:
        video = video_of(clip)
        peak_index = peak_frame_index(clip) if recipe.frame == "peak" else None
        media = read_clip(video, job.config, job.wanted, frame=recipe.frame, peak_index=peak_index)
        subtitle = clip.subtitle
        if not subtitle and "speech" not in recipe.subtitles:
            subtitle = subtitle_of(video, recipe.subtitles).text
        return _Read(media, *read_features(clip, recipe.feature_size), subtitle)
    except UserError as error:
        return error
    except MemoryError:
        return UserError(f"{clip.video}: does not fit into the memory; cut it, or make it smaller")


def _write_npy(folder: Path, name: str, features: Float[np.ndarray, "3 F"], has: Bool[np.ndarray, " 3"]) -> None:
    for names, vector, there in zip(FEATURE_FOLDERS, features, has, strict=True):
        if there:
            path = folder / names[0] / f"{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, vector)
