"""Reads clips given as paths, bytes, records or arrays, in any mixture."""

import contextlib
import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from emollama_jax.data.clip_files import readable_name
from emollama_jax.errors import UserError
from emollama_jax.infer.answer import ClipError, Query
from emollama_jax.infer.clip_input import ClipInput
from emollama_jax.infer.inputs import Item, ItemRead, VideoClips

Pair = tuple[Item, ItemRead]  # a clip and what was read of it


class QueryReader:
    """Reads and encodes the clips of queries.

    Args:
        make_videos: makes the reader of videos; without it there are no videos.
    """

    def __init__(self, make_videos: Callable[..., VideoClips] | None):
        self._make_videos = make_videos

    def videos(self, **settings: Any) -> VideoClips:
        """Return the reader of videos, with further `settings`. Raises UserError where there is none."""
        if self._make_videos is None:
            raise UserError("videos need their encoders: load the engine with inputs='videos'")
        return self._make_videos(**settings)

    def read(self, queries: Iterable[Query]) -> Iterator[tuple[Query, Pair | ClipError]]:
        """Yield what was read of each clip, or why it could not be, in their order; paths in a row are read ahead."""
        for is_path, group in itertools.groupby(queries, lambda query: isinstance(query.clip, str | Path)):
            if not is_path:
                yield from ((query, self._read_in_memory(query)) for query in group)
                continue
            of_paths = list(group)
            items = [_item(query, Path(query.clip)) for query in of_paths]
            with contextlib.closing(self.videos().read(items)) as reads:
                for query, item, read in zip(of_paths, items, reads, strict=True):
                    yield query, _pair(item, read)

    def _read_in_memory(self, query: Query) -> Pair | ClipError:
        if isinstance(query.clip, bytes):
            with tempfile.TemporaryDirectory() as folder:
                item = _item(query, Path(folder) / "clip")
                item.video.write_bytes(query.clip)
                (read,) = self.videos().read([item])
                return _pair(item, read)
        clip = query.clip if isinstance(query.clip, ClipInput) else ClipInput.of_record(query.clip)
        given = {"name": query.name, "subtitle": query.subtitle}
        clip = dataclasses.replace(clip, **{field: text for field, text in given.items() if text})
        return Item(clip.name), ItemRead(clip.subtitle, "", clip)

    def encode(self, items: Sequence[Item], reads: Sequence[ItemRead]) -> list[ClipInput]:
        """Return the clips as arrays."""
        clips = [read.clip for read in reads]
        if media := [i for i, clip in enumerate(clips) if clip is None]:
            encoded = self.videos().encode([items[i] for i in media], [reads[i] for i in media])
            for i, clip in zip(media, encoded, strict=True):
                clips[i] = clip
        return clips


def _item(query: Query, path: Path) -> Item:
    return Item(query.name or readable_name(path.name), path, subtitle=query.subtitle, peak_index=query.peak_index)


def _pair(item: Item, read: ItemRead | UserError) -> Pair | ClipError:
    return (item, read) if isinstance(read, ItemRead) else ClipError("read", item.name, str(read))
