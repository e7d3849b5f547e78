"""From annotated clips to records: frames decoded in parallel, kept in parts so that a stopped preparation goes on.

A part holds the records of a few clips, what is to be told about each, and a list of those that could not be made.
Parts are written to a folder beside the data set, each complete or not at all, and go when the data set is complete.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module
from jaxtyping import Bool, Float, UInt8

from emollama_jax.data.annotations import Clip
from emollama_jax.data.clip_files import FEATURE_SIZE, read_feature
from emollama_jax.data.records import decode_frame, encode_frame, features_dict
from emollama_jax.data.tables import Problem
from emollama_jax.errors import UserError
from emollama_jax.io.atomic import atomic_file
from emollama_jax.io.worker_pool import map_ahead
from emollama_jax.media.clip import FRAME_RULES, frame_index
from emollama_jax.media.images import eva_vit_frame
from emollama_jax.media.peak import openface_peak
from emollama_jax.media.video import read_frame

CLIPS_PER_PART = 64

Encode = Callable[[UInt8[np.ndarray, "N I I 3"]], Float[np.ndarray, "N T D"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How records are made; it is written into the data set's metadata.

    Attributes:
        labels: the emotions; a record keeps the index of its own.
        frame: which one: first, middle, peak, or a number from 0.
        image: "frame" or "image_tokens".
        size: pixels along each side of the frame.
        encoder: what computes the image tokens, as its fingerprint; "" for frames.
        image_tokens_shape: their shape.
        feature_size: numbers of a feature.
        encoders: what computes the features, by name, as their fingerprints; none where they are read from files.
        subtitles: where the subtitle of a clip is looked for whose list has none.
    """

    labels: tuple[str, ...]
    frame: str = "first"
    image: str = "frame"
    size: int = 448
    encoder: str = ""
    image_tokens_shape: tuple[int, int] = (1025, 1408)
    feature_size: int = FEATURE_SIZE
    encoders: Mapping[str, str] = field(default_factory=dict)
    subtitles: tuple[str, ...] = ()

    def __post_init__(self):
        if self.frame not in FRAME_RULES and not self.frame.isdecimal():
            raise UserError(f"frame rule {self.frame!r}: give {', '.join(FRAME_RULES)} or a frame's number from 0")

    def label_index(self, label: str | None) -> int:
        """The index among the labels, -1 for none of them."""
        return self.labels.index(label) if label in self.labels else -1

    def features(self, image: str | None = None):
        """The TFDS features of the records, or of those with another kind of image."""
        return features_dict(
            image or self.image, feature_size=self.feature_size, image_tokens_shape=self.image_tokens_shape
        )

    def fingerprint(self, clips: Sequence[Clip]) -> str:
        """Of the recipe and all that it is applied to, files by their name, size and time."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode())
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


def make_record(clip: Clip, recipe: Recipe) -> dict[str, Any]:
    """The record of one clip, with its frame.

    Raises:
        UserError: the clip has no video, no peak frame where the rule asks for one, or a file of it cannot be read.
    """
    peak_index = peak_frame_index(clip) if recipe.frame == "peak" else None
    if recipe.frame == "peak" and peak_index is None:
        raise UserError(f"clip {clip.name} has no peak frame; take another frame rule, or emollama extract to find it")
    pixels = read_frame(video_of(clip), lambda count: frame_index(recipe.frame, count, peak_index))
    frame = eva_vit_frame(pixels, recipe.size)
    return record_of(clip, recipe, *read_features(clip, recipe.feature_size)) | {"frame": encode_frame(frame)}


def video_of(clip: Clip) -> Path:
    """Raises UserError for a clip without a video."""
    if clip.video is None:
        raise UserError(f"clip {clip.name} has no video; put it into the folder of videos")
    return clip.video


def peak_frame_index(clip: Clip) -> int | None:
    """The number of the peak frame: as listed, or by OpenFace's action units; None where there are neither."""
    if clip.peak_index is None and clip.openface is not None:
        return openface_peak(clip.openface)
    return clip.peak_index


def read_features(clip: Clip, size: int = FEATURE_SIZE) -> tuple[Float[np.ndarray, "3 F"], Bool[np.ndarray, " 3"]]:
    """The features in a clip's files, zeros where there is none, and which there are."""
    features, has = np.zeros((len(clip.features), size), np.float32), np.array(clip.has_feature)
    for i, path in enumerate(clip.features):
        if path is not None:
            features[i] = read_feature(path)
    return features, has


def record_of(
    clip: Clip, recipe: Recipe, features: Float[np.ndarray, "3 F"], has_feature: Bool[np.ndarray, " 3"]
) -> dict[str, Any]:
    """The record of a clip but for its image."""
    return {
        "name": clip.name,
        "emotion": recipe.label_index(clip.emotion),
        "valence": math.nan if clip.valence is None else clip.valence,
        "subtitle": clip.subtitle,
        "caption_coarse": clip.caption_coarse,
        "caption_fine": clip.caption_fine,
        "features": features,
        "has_feature": has_feature,
    }


@dataclass(frozen=True)
class Preparation:
    """Makes the parts of a data set, of frames and of features that are there.

    Attributes:
        workers: processes that decode; 1 is this one.
        encode: from frames to image tokens, for a recipe of these.
    """

    workers: int = 1
    encode: Encode | None = None

    def __call__(self, clips: Sequence[Clip], recipe: Recipe, folder: Path) -> list[Path]:
        """Makes the parts that are not in `folder` yet, and returns all of them in the order of the clips."""
        folder.mkdir(parents=True, exist_ok=True)
        chunks = [clips[i : i + CLIPS_PER_PART] for i in range(0, len(clips), CLIPS_PER_PART)]
        decoded = [folder / f"frames-{i:05d}.array_record" for i in range(len(chunks))]
        finished = [folder / f"{recipe.image}-{i:05d}.array_record" for i in range(len(chunks))]
        if recipe.image == "frame":
            finished = decoded
        todo = [i for i, path in enumerate(finished) if not path.exists()]
        jobs = [(chunks[i], recipe, decoded[i]) for i in todo]
        for i, error in zip(todo, map_ahead(_decode_part, jobs, self.workers if self.workers > 1 else 0), strict=True):
            if error:
                names = f"{chunks[i][0].name} to {chunks[i][-1].name}"
                raise UserError(
                    f"the process died that decoded the clips {names}; leave out the damaged one"
                ) from error
            if recipe.image != "frame":
                _encode_part(decoded[i], finished[i], recipe, self.encode)
        return finished


def _decode_part(job: tuple[Sequence[Clip], Recipe, Path]) -> None:
    clips, recipe, path = job
    if path.exists():
        return
    features, records, problems = recipe.features("frame"), [], []
    for clip in clips:
        try:
            records.append(features.serialize_example(make_record(clip, recipe)))
        except UserError as error:
            problems.append(problem_of(clip, error))
    with atomic_file(path) as partial:
        write_part(partial, records, problems=problems)


def _encode_part(frames: Path, path: Path, recipe: Recipe, encode: Encode | None) -> None:
    if encode is None:
        raise ValueError("image tokens need an encoder")
    header, *records = read_serialized(frames)
    before, after = recipe.features("frame"), recipe.features()
    records = [before.deserialize_example_np(record) for record in records]
    tokens = encode(np.stack([decode_frame(record.pop("frame")) for record in records])) if records else ()
    for record, image_tokens in zip(records, tokens, strict=True):
        record["image_tokens"] = image_tokens.astype(np.float16)
    with atomic_file(path) as partial:
        write_part(partial, [*map(after.serialize_example, records)], **json.loads(header))
    frames.unlink()


def problem_of(clip: Clip, error: Exception) -> dict[str, str]:
    """The entry in a part of a clip that could not be made into a record."""
    return {"name": clip.name, "file": str(clip.video or ""), "message": str(error)}


def write_part(
    path: Path, records: Sequence[bytes], *, problems: Sequence[dict] = (), clip_info: Sequence[dict] = ()
) -> None:
    """Writes a part: a header in JSON, then the records.

    Args:
        problems: see `problem_of`.
        clip_info: what is to be told about the records' clips.
    """
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in (json.dumps({"problems": [*problems], "clip_info": [*clip_info]}).encode(), *records):
        writer.write(record)
    writer.close()


def read_serialized(path: Path) -> list[bytes]:
    """All that a part holds: its header, then its records."""
    reader = array_record_module.ArrayRecordReader(str(path))
    records = reader.read_all()
    reader.close()
    return records


def records_of(parts: Sequence[Path], recipe: Recipe) -> Iterator[dict[str, Any]]:
    """The records in parts."""
    features = recipe.features()
    for path in parts:
        for record in read_serialized(path)[1:]:
            yield features.deserialize_example_np(record)


def problems_of(parts: Sequence[Path]) -> list[Problem]:
    """The clips that could not be made into records."""
    found = [entry for path in parts for entry in json.loads(read_serialized(path)[0])["problems"]]
    return [Problem(kind="not_prepared", line=None, **entry) for entry in found]


def clip_info_of(parts: Sequence[Path]) -> list[dict[str, Any]]:
    """What is to be told about the clips."""
    return [entry for path in parts for entry in json.loads(read_serialized(path)[0])["clip_info"]]
