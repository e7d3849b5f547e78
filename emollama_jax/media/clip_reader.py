"""Clips for the encoders: read in worker processes ahead of their turn, with what is said in them.

reader = ClipReader(config.clip, encoders.read_spec(448), frame_rule="peak", subtitle_sources=("file",), workers=8)
for read in reader.read(requests): ...
"""

import contextlib
import dataclasses
import functools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from emollama_jax.errors import UserError
from emollama_jax.io.worker_pool import map_ahead
from emollama_jax.media.clip import ClipConfig, ClipMedia, ClipRequest, ReadSpec, check_frame_rule, read_clip
from emollama_jax.media.subtitles import Transcribe, check_subtitle_sources, subtitle_of


@dataclass(frozen=True)
class ClipRead:
    """What was read of a clip, and what is said in it."""

    name: str
    media: ClipMedia
    subtitle: str


class ClipReader:
    """Reads clips: for extraction, preparation and prediction alike.

    The subtitle is the request's own, else that of the first source with a word in it. Sources up to `speech` are tried
    by the worker, those from there on by this process, which has the recogniser.

    Args:
        config: how videos are read; None reads a single frame of a clip of any length (see `read_clip`).
        frame_rule: first, middle, peak, or a number from 0.
        subtitle_sources: any of `media.subtitles.SOURCES`, in the order in which they are tried.
        transcribe: listens to `speech`.
        workers: processes; 0 reads in this one.
        ahead: clips that are read or under way before their turn; two a worker by default.

    Raises:
        UserError: an unknown frame rule or source, or `speech` without `transcribe`.
    """

    def __init__(
        self,
        config: ClipConfig | None,
        spec: ReadSpec,
        *,
        frame_rule: str,
        subtitle_sources: Sequence[str] = (),
        transcribe: Transcribe | None = None,
        workers: int = 0,
        ahead: int | None = None,
    ):
        sources = check_subtitle_sources(subtitle_sources, transcribe)
        first_heard = sources.index("speech") if "speech" in sources else len(sources)
        self._heard, self._transcribe = sources[first_heard:], transcribe
        self._workers, self._ahead = workers, ahead
        self._work = functools.partial(
            _read,
            config=config,
            spec=spec,
            frame_rule=check_frame_rule(frame_rule),
            subtitle_sources=sources[:first_heard],
        )

    def read(self, requests: Iterable[ClipRequest]) -> Iterator[ClipRead | UserError]:
        """Yield what was read of each clip, or why it could not be, in their order."""
        coming: deque[ClipRequest] = deque()

        def noted() -> Iterator[ClipRequest]:
            for request in requests:
                coming.append(request)
                yield request

        with contextlib.closing(map_ahead(self._work, noted(), self._workers, self._ahead)) as results:
            for result in results:
                yield self._finish(coming.popleft(), result)

    def _finish(self, request: ClipRequest, result: ClipRead | Exception) -> ClipRead | UserError:
        """Listen to a clip whose words were not found, and name one whose worker died."""
        if isinstance(result, BrokenProcessPool):
            reason = "it is damaged, or does not fit into memory"
            return UserError(f"{request.video}: the process that decoded it died; {reason}")
        if isinstance(result, Exception) or result.subtitle or not self._heard:
            return result
        try:
            return dataclasses.replace(result, subtitle=subtitle_of(request.video, self._heard, self._transcribe).text)
        except UserError as error:
            return error
        except MemoryError:
            return _too_large(request.video)


def _read(
    request: ClipRequest,
    *,
    config: ClipConfig | None,
    spec: ReadSpec,
    frame_rule: str,
    subtitle_sources: tuple[str, ...],
) -> ClipRead | UserError:
    """Read a clip in a worker."""
    try:
        media = read_clip(request, config, spec, frame_rule=frame_rule)
        return ClipRead(request.name, media, request.subtitle or subtitle_of(request.video, subtitle_sources).text)
    except UserError as error:
        return error
    except MemoryError:
        return _too_large(request.video)


def _too_large(video: Path | None) -> UserError:
    return UserError(f"{video}: does not fit into the memory; cut it, or make it smaller")
