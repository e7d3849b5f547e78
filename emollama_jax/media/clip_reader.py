"""Clips for the encoders: read by child processes ahead of their turn, with what is said in them.

No decoder runs in this process, so that a fault in one costs no more than the clip that sets it off.

reader = ClipReader(config.clip, encoders.read_spec(448), frame_rule="peak", subtitle_sources=("file",), workers=8)
for read in reader.read(requests): ...
"""

import contextlib
import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from emollama_jax.errors import UserError, first_line
from emollama_jax.io.worker_pool import WorkerDied, WorkerStopped, map_ahead, run_apart
from emollama_jax.media.audio import read_sound
from emollama_jax.media.clip import ClipConfig, ClipMedia, ClipRequest, ReadSpec, check_frame_rule, read_clip
from emollama_jax.media.container import decoder_fault, import_av
from emollama_jax.media.read_limits import ReadLimits, check_pictures, memory_limited
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
    by the worker, those from there on when the clip's turn comes; the recogniser runs in this process.

    Args:
        config: how videos are read; None reads a single frame of a clip of any length (see `read_clip`).
        frame_rule: first, middle, peak, or a number from 0.
        subtitle_sources: any of `media.subtitles.SOURCES`, in the order in which they are tried.
        subtitle_language: of files and tracks, as in "en"; "" takes any, see `find_subtitle_files`.
        transcribe: listens to `speech`.
        workers: child processes that decode; 0 is one that reads each clip when its turn comes.
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
        subtitle_language: str = "",
        transcribe: Transcribe | None = None,
        workers: int = 0,
        ahead: int | None = None,
    ):
        sources = check_subtitle_sources(subtitle_sources, transcribe)
        first_heard = sources.index("speech") if "speech" in sources else len(sources)
        self._heard, self._transcribe = sources[first_heard:], transcribe
        self._workers = max(workers, 1)
        self._ahead = max(2 * workers, 1) if ahead is None else ahead
        self._read = functools.partial(
            _read,
            config=config,
            spec=spec,
            frame_rule=check_frame_rule(frame_rule),
            subtitle_sources=sources[:first_heard],
            subtitle_language=subtitle_language,
        )

    def read(self, requests: Iterable[ClipRequest]) -> Iterator[ClipRead | UserError]:
        """Yield what was read of each clip, or why it could not be, in their order."""
        coming: deque[ClipRequest] = deque()

        def noted() -> Iterator[ClipRequest]:
            for request in requests:
                coming.append(request)
                yield request

        with contextlib.closing(map_ahead(self._read, noted(), self._workers, self._ahead)) as results:
            for result in results:
                yield self._finish(coming.popleft(), result)

    def read_one(
        self, request: ClipRequest, limits: ReadLimits, *, is_cancelled: Callable[[], bool] | None = None
    ) -> ClipRead | UserError:
        """Read a stranger's clip, within limits; several threads may do so at once.

        Raises:
            WorkerStopped: `is_cancelled` said so.
        """
        apart = functools.partial(run_apart, timeout_s=limits.seconds, is_cancelled=is_cancelled)
        try:
            result = apart(functools.partial(self._read, limits=limits), request)
        except WorkerDied as error:
            if is_cancelled is not None and is_cancelled():
                raise
            result = error
        return self._finish(request, result, apart, limits)

    def _finish(
        self,
        request: ClipRequest,
        result: ClipRead | UserError | WorkerDied,
        apart: Callable = run_apart,
        limits: ReadLimits | None = None,
    ) -> ClipRead | UserError:
        """Read a clip again whose child died, and listen to one whose words were not found."""
        if isinstance(result, WorkerDied):
            result = self._without_sound(request, result, apart, limits)
        if isinstance(result, UserError) or result.subtitle or not self._heard:
            return result
        try:
            return self._listen(result, request.sound or request.video, apart)
        except (UserError, MemoryError) as error:
            reason = str(error) or "it does not fit into the memory"
        except WorkerDied as error:
            reason = decoder_fault(error)
        result.media.note(f"its words cannot be heard ({reason})")
        return result

    def _without_sound(
        self, request: ClipRequest, died: WorkerDied, apart: Callable, limits: ReadLimits | None
    ) -> ClipRead | UserError:
        """What can be read of a clip whose child died: its sound may be what ends it."""
        spec = self._read.keywords["spec"]
        if not spec.sound or request.video is None or isinstance(died, WorkerStopped):
            return _died(request.video or request.sound, died)
        try:
            result = apart(functools.partial(self._read, spec=spec._replace(sound=False), limits=limits), request)
        except WorkerDied:
            return _died(request.video, died)
        if isinstance(result, ClipRead):
            result.media.note(f"its sound is left out: it ended the process that decoded it ({decoder_fault(died)})")
        return result

    def _listen(self, read: ClipRead, video: Path, apart: Callable) -> ClipRead:
        """The clip with the words of the first of the sources from `speech` on that has some."""
        for source in self._heard:
            if source != "speech":
                options = {"language": self._read.keywords["subtitle_language"], "span": read.media.span}
                found = apart(functools.partial(subtitle_of, sources=(source,), **options), video)
                read.media.note(*found.notes)
                text = found.text
            else:
                sound = apart(read_sound, video)
                text = "" if sound is None else self._transcribe(sound)
            if text:
                read.media.clip_info["subtitle_source"] = source
                return dataclasses.replace(read, subtitle=text)
        return read


def _read(
    request: ClipRequest,
    *,
    config: ClipConfig | None,
    spec: ReadSpec,
    frame_rule: str,
    subtitle_sources: tuple[str, ...],
    subtitle_language: str,
    limits: ReadLimits | None = None,
) -> ClipRead | UserError:
    """Read a clip, in a child process."""
    path = request.video or request.sound
    try:
        import_av()  # before memory is limited, or a lack of it reads as a lack of the package
        with contextlib.nullcontext() if limits is None else memory_limited(limits):
            if limits is not None and request.video is not None:
                check_pictures(request.video, limits, config.max_seconds)
            media = read_clip(request, config, spec, frame_rule=frame_rule)
            subtitle, source = request.subtitle, "given"
            if not subtitle:
                found = subtitle_of(path, subtitle_sources, language=subtitle_language, span=media.span)
                subtitle, source = found.text, found.source
                media.note(*found.notes)
        if subtitle:
            media.clip_info["subtitle_source"] = source
        return ClipRead(request.name, media, subtitle)
    except UserError as error:
        return error
    except MemoryError:
        return UserError(f"{path}: does not fit into the memory; cut it, or make it smaller")
    except Exception as error:  # of a decoder, on a file that nobody has thought of
        reason = f"{type(error).__name__}: {first_line(error)}"
        return UserError(f"{path}: cannot be read ({reason}); write it anew with ffmpeg, or leave it out")


def _died(video: Path, died: WorkerDied) -> UserError:
    if isinstance(died, WorkerStopped):
        return UserError(f"{video}: cannot be read in time ({died}); cut it, or make it smaller")
    return UserError(f"{video}: it ended the process that decoded it: {decoder_fault(died)}")
