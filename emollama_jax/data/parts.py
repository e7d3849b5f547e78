"""From annotated clips to records, in parts: clips are read ahead, a part of them is encoded, and its records are kept.

A part is a file in a folder beside the data set, complete or absent, so that work that was stopped goes on: a header in
JSON (what is to be told of its clips, and which of them could not be made into records), then the serialised records.

Axes: N clips, F feature size, T image tokens, D their width.
"""

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module
from etils import epath
from jaxtyping import Bool, Float

from emollama_jax.data.annotations import Clip
from emollama_jax.data.clip_files import FEATURE_SIZE, read_feature
from emollama_jax.data.recipe import Recipe
from emollama_jax.data.records import encode_frame
from emollama_jax.errors import UserError
from emollama_jax.io.atomic import atomic_file
from emollama_jax.io.paths import PathLike, as_path, local_copy
from emollama_jax.io.stopwatch import Stopwatch
from emollama_jax.media.clip import ClipConfig, ClipRequest, ReadSpec
from emollama_jax.media.clip_reader import ClipRead, ClipReader
from emollama_jax.media.subtitles import Transcribe

CLIPS_PER_PART = 16
FRAME_ALONE = ReadSpec(face=None, motion=None, sound=False)


class EncodedClips(NamedTuple):
    """What encoders make of clips; None where there is no encoder."""

    features: Float[np.ndarray, "N 3 F"] | None = None
    """MAE, VideoMAE, HuBERT; zeros where there is none."""
    has_feature: Bool[np.ndarray, "N 3"] | None = None
    image_tokens: Float[np.ndarray, "N T D"] | None = None


class ClipFeatures(NamedTuple):
    """A clip's features in the order MAE, VideoMAE, HuBERT, zeros for what is missing, and which of them there are."""

    values: Float[np.ndarray, "3 F"]
    present: Bool[np.ndarray, " 3"]


@dataclass
class PartMaker:
    """Makes the parts of a data set out of its videos and feature files.

    A feature that `encode` does not compute comes from the clip's file, if it has one.
    """

    clip_config: ClipConfig | None = None
    """How videos are read; None reads a single frame of each, whose number is known (see `read_clip`)."""
    read_spec: ReadSpec = FRAME_ALONE
    """What is read for `encode`; the frame has the recipe's size."""
    encode: Callable[[Sequence[ClipRead]], EncodedClips] | None = None
    """Encodes the clips of a part; image tokens need it."""
    workers: int = 0
    """Processes that read clips; 0 is one that reads each when its turn comes."""
    shard_index: int = 0
    num_shards: int = 1
    """This process makes every `num_shards`-th part, from `shard_index` on."""
    transcribe: Transcribe | None = None
    """Listens, where `speech` is one of the recipe's subtitle sources."""
    on_part: Callable[[int, int], None] | None = None
    """Is told how many clips are done, and how many of them were put aside."""
    clock: Stopwatch = field(default_factory=Stopwatch)
    """Measures each kind of work: `decode`, `face` and `sound` by all workers together, and `wait`, for clips that were
    not read yet. `encode` may add its own."""

    def __call__(self, clips: Sequence[Clip], recipe: Recipe, folder: PathLike) -> list[epath.Path]:
        """Make this process's parts that are not in `folder` yet, and return the paths of all, in the clips' order."""
        folder = as_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        starts = range(0, len(clips), CLIPS_PER_PART)
        parts = [(folder / f"{start:06d}.array_record", clips[start : start + CLIPS_PER_PART]) for start in starts]
        mine = parts[self.shard_index :: self.num_shards]
        todo = [(path, some) for path, some in mine if not path.exists()]
        reader = ClipReader(
            self.clip_config,
            self.read_spec._replace(frame=recipe.size),
            frame_rule=recipe.frame_rule,
            subtitle_sources=recipe.subtitle_sources,
            subtitle_language=recipe.subtitle_language,
            transcribe=self.transcribe,
            workers=self.workers,
            ahead=max(CLIPS_PER_PART, 2 * self.workers),  # the next part is read while this one is encoded
        )
        requests = (
            ClipRequest(clip.name, clip.video, clip.subtitle, clip.peak_index, clip.openface)
            for _, some in todo
            for clip in some
        )
        with contextlib.closing(reader.read(requests)) as reads, ThreadPoolExecutor() as threads:
            for path, some in todo:
                with self.clock("wait"):
                    found = list(itertools.islice(reads, len(some)))
                self._write(path, some, found, recipe, threads)
        return [path for path, _ in parts]

    def _write(
        self,
        path: epath.Path,
        clips: Sequence[Clip],
        reads: Sequence[ClipRead | UserError],
        recipe: Recipe,
        threads: ThreadPoolExecutor,
    ) -> None:
        """Write a part, of the clips and what was read of each."""
        good: list[tuple[Clip, ClipRead, ClipFeatures]] = []
        problems, clip_info = [], []
        features_of = lambda clip: _features_or_error(clip, recipe.feature_size)
        for clip, read, features in zip(clips, reads, threads.map(features_of, clips), strict=True):
            if error := next((found for found in (read, features) if isinstance(found, UserError)), None):
                problems.append({"name": clip.name, "file": str(clip.video or ""), "message": str(error)})
            else:
                good.append((clip, read, features))
                info = {"name": clip.name, "split": clip.split, **read.media.clip_info, "subtitle": read.subtitle}
                clip_info.append(info)
                for kind, seconds in read.media.seconds.items():
                    self.clock.add(kind, seconds)
        encoded = self.encode([read for _, read, _ in good]) if self.encode and good else EncodedClips()
        if recipe.image_storage == "frame":
            images = threads.map(lambda one: {"frame": encode_frame(one[1].media.frame)}, good)
        elif good and encoded.image_tokens is None:
            raise ValueError("image tokens need an encoder")
        else:
            images = ({"image_tokens": encoded.image_tokens[i].astype(np.float16)} for i in range(len(good)))
        records, serialize = [], recipe.features().serialize_example
        for i, ((clip, read, features), image) in enumerate(zip(good, images, strict=True)):
            if encoded.features is not None:
                computed = ClipFeatures(encoded.features[i], encoded.has_feature[i])
                values = np.where(computed.present[:, None], computed.values, features.values)
                features = ClipFeatures(values, computed.present | features.present)
            records.append(serialize(make_record(clip, recipe, read.subtitle, features) | image))
        with atomic_file(path) as partial:
            write_part(partial, records, problems=problems, clip_info=clip_info)
        if self.on_part:
            self.on_part(len(clips), len(problems))


def read_features(clip: Clip, size: int = FEATURE_SIZE) -> ClipFeatures:
    """Read the features in a clip's files.

    Raises:
        UserError: a file cannot be read, or does not hold `size` numbers.
    """
    values = np.zeros((len(clip.features), size), np.float32)
    for i, path in enumerate(clip.features):
        if path is not None:
            if size != FEATURE_SIZE:
                raise UserError(
                    f"{path}: feature files hold {FEATURE_SIZE} numbers and the model takes {size} "
                    "(config.projectors.feature_size); give an encoder for the feature, or leave out its folder"
                )
            values[i] = read_feature(path)
    return ClipFeatures(values, np.array(clip.has_feature))


def _features_or_error(clip: Clip, size: int) -> ClipFeatures | UserError:
    try:
        return read_features(clip, size)
    except UserError as error:
        return error


def make_record(clip: Clip, recipe: Recipe, subtitle: str, features: ClipFeatures) -> dict[str, Any]:
    """Return the record of a clip but for its image."""
    return {
        "name": clip.name,
        "emotion": recipe.label_index(clip.emotion),
        "valence": math.nan if clip.valence is None else clip.valence,
        "subtitle": subtitle,
        "caption_coarse": clip.caption_coarse,
        "caption_fine": clip.caption_fine,
        "features": features.values,
        "has_feature": features.present,
    }


def write_part(
    path: PathLike, records: Sequence[bytes], *, problems: Sequence[dict] = (), clip_info: Sequence[dict] = ()
) -> None:
    """Write a part.

    Args:
        problems: `name`, `file` and `message` of clips that could not be made into records.
        clip_info: what is to be told about the records' clips.
    """
    header = json.dumps({"problems": [*problems], "clip_info": [*clip_info]}).encode()
    write_array_record(path, (header, *records))


def write_array_record(path: PathLike, records: Iterable[bytes]) -> int:
    """Write an ArrayRecord file in which each record is read by itself, and return the bytes of all."""
    writer, size = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed"), 0
    for record in records:
        writer.write(record)
        size += len(record)
    writer.close()
    return size


def read_header(path: PathLike) -> Mapping[str, list[dict[str, Any]]]:
    """Return the `problems` and the `clip_info` of a part."""
    with _reader(path) as reader:
        return json.loads(reader.read([0])[0])


def count_records(path: PathLike) -> int:
    """Return how many records a part holds."""
    with _reader(path) as reader:
        return reader.num_records() - 1


def read_records(path: PathLike) -> list[bytes]:
    """Return the serialised records of a part."""
    with _reader(path) as reader:
        return reader.read_all()[1:]


@contextlib.contextmanager
def _reader(path: PathLike) -> Iterator[array_record_module.ArrayRecordReader]:
    with local_copy(path) as local:
        reader = array_record_module.ArrayRecordReader(str(local))
        try:
            yield reader
        finally:
            reader.close()
