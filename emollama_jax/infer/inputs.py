"""What is predicted about: a video, a folder of videos, a manifest that names videos, or the records of a data set.

    items = find_items("clips.csv")
    source = VideoClips(config, encode, spec, frame_rule="peak", workers=8)
    for item, read in zip(items, source.read(items)): ...

A manifest is a list or table as `data/tables.py` reads them: `video`, a path from its folder of videos, or a `name`
alone, of a video there; where there are both, `name` is what the clip is called. `subtitle`, `question` and
`peak_index` are taken too. A line that cannot be used, or is about a clip of a line before, becomes an item with a
`fault`: it is answered by an error.

Axes: N clips, F feature size.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from emollama_jax.config import Config
from emollama_jax.data.clip_files import FolderFiles, find_below, readable_name
from emollama_jax.data.problems import Problem
from emollama_jax.data.records import Records, read_clip_info
from emollama_jax.data.table_files import SUFFIXES
from emollama_jax.data.tables import Row, key_of, read_rows
from emollama_jax.errors import UserError
from emollama_jax.infer.clip_input import ClipInput
from emollama_jax.io.checksums import file_digest
from emollama_jax.media.clip import ClipMedia, ClipRequest, ReadSpec
from emollama_jax.media.clip_reader import ClipRead, ClipReader
from emollama_jax.media.container import VIDEO_SUFFIXES
from emollama_jax.media.read_limits import ReadLimits
from emollama_jax.media.subtitle_files import find_subtitle_files
from emollama_jax.media.subtitles import Transcribe

EncodeFeatures = Callable[..., tuple[Float[np.ndarray, "N 3 F"], Bool[np.ndarray, "N 3"]]]


@dataclass(frozen=True)
class Item:
    """A clip to be asked about.

    Attributes:
        name: unlike that of any other; of a record it is a stand-in, as its own is not known before it is read.
        video: its file; None for a record.
        index: its number among the records; None for a video.
        question: asked in place of the run's own.
        fault: why there is nothing to be asked about.
        sound: a file with the clip's sound, in place of the video's own.
        digest: SHA-256 of `video` and `sound`, where it is known already.
    """

    name: str
    video: Path | None = None
    index: int | None = None
    subtitle: str = ""
    question: str = ""
    peak_index: int | None = None
    fault: str = ""
    sound: Path | None = None
    digest: str = ""

    @property
    def key(self) -> str | int:
        """By which the answers about it are found again."""
        return self.name if self.index is None else self.index


@dataclass(frozen=True)
class ItemRead:
    """What was read of an item.

    Attributes:
        fingerprint: of all that was read.
        clip: as the model takes it; None where its `media` is still to be encoded.
        clip_info: for people, in JSON's types.
        seconds: spent on it, by kind of work.
    """

    subtitle: str
    fingerprint: str
    clip: ClipInput | None = None
    media: ClipMedia | None = None
    clip_info: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def find_items(where: str | Path, videos: Path | None = None) -> list[Item]:
    """Find the clips that a video, a folder of videos or a manifest means.

    Args:
        videos: the folder of a manifest's videos; default: its own.

    Raises:
        UserError: there is no such file or folder, no clip in it, or it cannot be read as a whole.
    """
    path = Path(where)
    if path.is_dir():
        named = FolderFiles(path, VIDEO_SUFFIXES).named()
        items = _each_once((Item(name, video), str(video)) for name, video in named)
    elif not path.is_file():
        raise UserError(f"no such file or folder: {path}; give a video, a folder of videos, a manifest or FOLDER:SPLIT")
    elif path.suffix.lower() in SUFFIXES:
        items = _of_manifest(path, videos or path.parent)
    else:
        items = [Item(readable_name(path.name), path)]
    if not items:
        raise UserError(f"no clips in {path}; give a folder with {', '.join(VIDEO_SUFFIXES)}, or a manifest with lines")
    return items


def _of_manifest(path: Path, folder: Path) -> list[Item]:
    problems: list[Problem] = []
    rows = read_rows(path, problems, needs=())
    if not rows and problems:
        raise UserError(f"no line that can be read, the first: {problems[0]}")
    videos = functools.cache(lambda: FolderFiles(folder, VIDEO_SUFFIXES))
    numbered: list[tuple[int, Item]] = []
    for problem in problems:
        if problem.kind == "unparsable_line":
            where = f"{path.name}:{problem.line}"
            numbered.append((problem.line or 0, Item(where, fault=problem.message)))
    numbered += [(row.line or 0, _of_row(path, row, folder, videos)) for row in rows]
    ordered = sorted(numbered, key=lambda pair: pair[0])
    return _each_once((item, f"{path.name}:{line}") for line, item in ordered)


def _each_once(items: Iterable[tuple[Item, str]]) -> list[Item]:
    """The items, each given with where it is from; one with the name of a clip before it is a fault."""
    names: dict[str, str] = {}
    unique = []
    for item, where in items:
        if (key := key_of(item.name)) in names:
            fault = f"{item.name!r} is the clip {names[key]!r}, which is listed before; give one of them another name"
            item = Item(where, fault=fault)
        names.setdefault(key, item.name)
        unique.append(item)
    return unique


def _of_row(path: Path, row: Row, folder: Path, videos: Callable[[], FolderFiles]) -> Item:
    fields = row.fields
    name, video = fields.get("name"), fields.get("video")
    if not (name or video):
        return Item(f"{path.name}:{row.line}", fault="neither a video nor a name; give one of them")
    found = (find_below(folder, video) or folder / video) if video else videos().select(name)
    fault = "" if found else f"no video {name!r} in {folder}; put it there, or give its path as video"
    known = {key: fields[key] for key in ("subtitle", "question", "peak_index") if key in fields}
    return Item(name or video, found, fault=fault, **known)


@runtime_checkable
class ClipSource(Protocol):
    """Where clips come from that are asked about."""

    def fingerprint(self, item: Item) -> str:
        """Return the fingerprint of all that is read of an item; "" where that cannot be read."""
        ...

    def read(self, items: Sequence[Item]) -> Iterator[ItemRead | UserError]:
        """Yield what was read of each item, or why it could not be, in their order."""
        ...

    def encode(self, items: Sequence[Item], reads: Sequence[ItemRead]) -> list[ClipInput]:
        """Return the clips with their features."""
        ...


class VideoClips:
    """Videos, read in worker processes ahead of their turn and encoded in batches: a `ClipSource`.

    Args:
        encode: from what was read to features and which there are: an `Encoders.features`.
        spec: what is read of a video for that: an `Encoders.read_spec`.
        frame_rule, subtitle_sources, subtitle_language, transcribe, workers: see `ClipReader`.
        sizes: of the encoders' batches: see `Encoders.features`.
    """

    def __init__(
        self,
        config: Config,
        encode: EncodeFeatures,
        spec: ReadSpec,
        *,
        frame_rule: str = "first",
        subtitle_sources: Sequence[str] = (),
        subtitle_language: str = "",
        transcribe: Transcribe | None = None,
        workers: int = 0,
        sizes: Sequence[int] = (),
    ):
        self.spec, self._sizes = spec, sizes
        self._encode, self._subtitle_sources, self._language = encode, subtitle_sources, subtitle_language
        self._reader = ClipReader(
            config.clip,
            spec,
            frame_rule=frame_rule,
            subtitle_sources=subtitle_sources,
            subtitle_language=subtitle_language,
            transcribe=transcribe,
            workers=workers,
        )

    def fingerprint(self, item: Item) -> str:
        looks_beside = item.video is not None and "file" in self._subtitle_sources
        beside = find_subtitle_files(item.video, self._language) if looks_beside else []
        try:
            own = [item.digest] if item.digest else [file_digest(path) for path in (item.video, item.sound) if path]
            return fingerprint_of(item, *own, *(file_digest(path) for path in beside))
        except OSError:
            return ""

    def read(self, items: Sequence[Item]) -> Iterator[ItemRead | UserError]:
        with contextlib.closing(self._reader.read(map(_clip_request, items))) as reads:
            for item, read in zip(items, reads, strict=True):
                yield self._item_read(item, read)

    def read_one(
        self, item: Item, limits: ReadLimits, *, is_cancelled: Callable[[], bool] | None = None
    ) -> ItemRead | UserError:
        """Read a stranger's clip within limits: see `ClipReader.read_one`."""
        return self._item_read(item, self._reader.read_one(_clip_request(item), limits, is_cancelled=is_cancelled))

    def _item_read(self, item: Item, read: ClipRead | UserError) -> ItemRead | UserError:
        if isinstance(read, UserError):
            return read
        media, fingerprint = read.media, self.fingerprint(item)
        return ItemRead(read.subtitle, fingerprint, None, media, media.clip_info, media.seconds)

    def encode(self, items: Sequence[Item], reads: Sequence[ItemRead]) -> list[ClipInput]:
        features, has = self._encode([read.media for read in reads], sizes=self._sizes)
        return [
            ClipInput(item.name, read.subtitle, features[i], has[i], frame=read.media.frame)
            for i, (item, read) in enumerate(zip(items, reads, strict=True))
        ]


def _clip_request(item: Item) -> ClipRequest:
    return ClipRequest(item.name, item.video, item.subtitle, item.peak_index, sound=item.sound)


class RecordClips:
    """The records of a split: a `ClipSource`.

    Attributes:
        items: the clips, in their order.
    """

    def __init__(self, records: Records):
        """Raises UserError where there are no records."""
        self._records = records
        own = ("name", "split", "subtitle")
        self._clip_info = {
            info["name"]: {name: value for name, value in info.items() if name not in own}
            for info in read_clip_info(records.path)
            if info["split"] == records.split
        }
        if not len(records):
            raise UserError(f"no clips in {records.path}:{records.split}; give a split that has some")
        self.items = [Item(f"{records.split}[{i}]", index=i) for i in range(len(records))]

    def fingerprint(self, item: Item) -> str:
        try:
            return self._fingerprint(item, self._records[item.index])
        except UserError:
            return ""

    def _fingerprint(self, item: Item, record: Mapping[str, Any]) -> str:
        arrays = [record["features"], record["has_feature"], record.get("image_tokens", record.get("frame"))]
        parts = [value if isinstance(value, bytes) else np.ascontiguousarray(value).tobytes() for value in arrays]
        digests = [hashlib.sha256(part).hexdigest() for part in parts]
        return fingerprint_of(item, record["name"], record["subtitle"], *digests)

    def read(self, items: Sequence[Item]) -> Iterator[ItemRead | UserError]:
        for item in items:
            try:
                record = self._records[item.index]
            except UserError as error:
                yield error
                continue
            clip, clip_info = ClipInput.of_record(record), self._clip_info.get(record["name"], {})
            yield ItemRead(clip.subtitle, self._fingerprint(item, record), clip, clip_info=clip_info)

    def encode(self, items: Sequence[Item], reads: Sequence[ItemRead]) -> list[ClipInput]:
        return [read.clip for read in reads]


def fingerprint_of(item: Item, *parts: str) -> str:
    """Return the fingerprint of what is told of an item, and of the contents that are read, given by their digests."""
    told = [item.subtitle, item.question, item.peak_index, *parts]
    return f"sha256:{hashlib.sha256(json.dumps(told).encode()).hexdigest()}"
