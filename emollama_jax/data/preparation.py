"""From annotated clips to records: frames decoded in parallel, kept in parts so that a stopped preparation goes on.

A part holds the records of a few clips and a list of those that could not be made. Parts are written to a folder
beside the data set, each complete or not at all, and go when the data set is complete.
"""

import dataclasses
import hashlib
import json
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module
from jaxtyping import Float, UInt8

from emollama_jax.data.annotations import Clip
from emollama_jax.data.clip_files import FEATURE_SIZE, read_feature
from emollama_jax.data.records import decode_frame, encode_frame, features_dict
from emollama_jax.data.tables import Problem
from emollama_jax.errors import UserError
from emollama_jax.media.images import eva_vit_frame
from emollama_jax.media.video import read_frame
from emollama_jax.weights.atomic import atomic_file

CLIPS_PER_PART = 64
FRAME_RULES = ("first", "middle", "peak")

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
    """

    labels: tuple[str, ...]
    frame: str = "first"
    image: str = "frame"
    size: int = 448
    encoder: str = ""
    image_tokens_shape: tuple[int, int] = (1025, 1408)
    feature_size: int = FEATURE_SIZE

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
            known = dataclasses.asdict(clip) | {"video": _stamp(clip.video), "features": [*map(_stamp, clip.features)]}
            digest.update(json.dumps(known).encode())
        return digest.hexdigest()[:16]


def _stamp(path: Path | None) -> tuple[str, int, int] | None:
    if path is None:
        return None
    status = path.stat()
    return path.name, status.st_size, status.st_mtime_ns


def make_record(clip: Clip, recipe: Recipe) -> dict[str, Any]:
    """The record of one clip, with its frame.

    Raises:
        UserError: the clip has no video, no peak frame where the rule asks for one, or a file of it cannot be read.
    """
    if clip.video is None:
        raise UserError(f"clip {clip.name} has no video; put it into the folder of videos")
    if recipe.frame == "peak" and clip.peak_index is None:
        raise UserError(f"clip {clip.name} has no peak frame; prepare with another frame rule")
    indices = {"first": 0, "middle": lambda count: count // 2, "peak": clip.peak_index}
    index = indices[recipe.frame] if recipe.frame in indices else int(recipe.frame)
    found = [None if path is None else read_feature(path) for path in clip.features]
    blank = np.zeros(recipe.feature_size, np.float32)
    return {
        "name": clip.name,
        "emotion": recipe.label_index(clip.emotion),
        "valence": math.nan if clip.valence is None else clip.valence,
        "subtitle": clip.subtitle,
        "caption_coarse": clip.caption_coarse,
        "caption_fine": clip.caption_fine,
        "features": np.stack([blank if vector is None else vector for vector in found]),
        "has_feature": np.array([vector is not None for vector in found]),
        "frame": encode_frame(eva_vit_frame(read_frame(clip.video, index), recipe.size)),
    }


def prepare_parts(
    clips: Sequence[Clip], recipe: Recipe, folder: Path, *, workers: int = 1, encode: Encode | None = None
) -> list[Path]:
    """Makes the parts that are not in `folder` yet, and returns all of them in the order of the clips.

    Args:
        workers: processes that decode; 1 is this one.
        encode: from frames to image tokens, for a recipe of these.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [clips[i : i + CLIPS_PER_PART] for i in range(0, len(clips), CLIPS_PER_PART)]
    decoded = [folder / f"frames-{i:05d}.array_record" for i in range(len(chunks))]
    finished = [folder / f"{recipe.image}-{i:05d}.array_record" for i in range(len(chunks))]
    if recipe.image == "frame":
        finished = decoded
    todo = [i for i, path in enumerate(finished) if not path.exists()]
    jobs = [(chunks[i], recipe, decoded[i]) for i in todo]
    with _pool(workers) as run:
        for i, _ in zip(todo, run(_decode_part, jobs), strict=True):
            if recipe.image != "frame":
                _encode_part(decoded[i], finished[i], recipe, encode)
    return finished


class _pool:
    """Runs jobs in order, in processes of their own or, for one worker, here."""

    def __init__(self, workers: int):
        self._executor = None
        if workers > 1:  # spawned: a forked JAX can deadlock
            self._executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))

    def __enter__(self):
        return self._executor.map if self._executor else map

    def __exit__(self, *error):
        if self._executor:
            self._executor.shutdown(cancel_futures=True)


def _decode_part(job: tuple[Sequence[Clip], Recipe, Path]) -> None:
    clips, recipe, path = job
    if path.exists():
        return
    features, records, problems = recipe.features("frame"), [], []
    for clip in clips:
        try:
            records.append(features.serialize_example(make_record(clip, recipe)))
        except UserError as error:
            problems.append({"name": clip.name, "file": str(clip.video or ""), "message": str(error)})
    with atomic_file(path) as partial:
        write_part(partial, [json.dumps(problems).encode(), *records])


def _encode_part(frames: Path, path: Path, recipe: Recipe, encode: Encode | None) -> None:
    if encode is None:
        raise ValueError("image tokens need an encoder")
    problems, *records = read_serialized(frames)
    before, after = recipe.features("frame"), recipe.features()
    records = [before.deserialize_example_np(record) for record in records]
    tokens = encode(np.stack([decode_frame(record.pop("frame")) for record in records])) if records else ()
    for record, image_tokens in zip(records, tokens, strict=True):
        record["image_tokens"] = image_tokens.astype(np.float16)
    with atomic_file(path) as partial:
        write_part(partial, [problems, *map(after.serialize_example, records)])
    frames.unlink()


def write_part(path: Path, records: Sequence[bytes]) -> None:
    """Writes what `read_serialized` reads."""
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def read_serialized(path: Path) -> list[bytes]:
    """All that a part holds: its problems as JSON, then its records."""
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
    found = [entry for path in parts for entry in json.loads(read_serialized(path)[0])]
    return [Problem(kind="not_prepared", line=None, **entry) for entry in found]
