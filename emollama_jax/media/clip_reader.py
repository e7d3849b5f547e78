"""Clips for the encoders: read by child processes ahead of their turn, with what is said in them.

No decoder runs in this process, so that a fault in one costs no more than the clip that sets it off.

reader = ClipReader(config.clip, encoders.read_spec(448), frame_rule="peak", subtitle_sources=("file",), workers=8)
for read in reader.read(requests): ...
"""

import contextlib
import dataclasses
import functools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from emollama_jax.errors import UserError, first_line
from emollama_jax.io.worker_pool import WorkerDied, map_ahead, run_apart
from emollama_jax.media.audio import read_sound
from emollama_jax.media.clip import ClipConfig, ClipMedia, ClipRequest, ReadSpec, check_frame_rule, read_clip
from emollama_jax.media.container import decoder_fault
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

    def _finish(self, request: ClipRequest, result: ClipRead | UserError | WorkerDied) -> ClipRead | UserError:
        """Read a clip again whose child died, and listen to one whose words were not found."""
        if isinstance(result, WorkerDied):
            result = self._without_sound(request, result)
        if isinstance(result, UserError) or result.subtitle or not self._heard:
            return result
        try:
            return self._listen(result, request.video)
        except (UserError, MemoryError) as error:
            reason = str(error) or "it does not fit into the memory"
        except WorkerDied as error:
            reason = decoder_fault(error)
        result.media.note(f"its words cannot be heard ({reason})")
        return result

    def _without_sound(self, request: ClipRequest, died: WorkerDied) -> ClipRead | UserError:
        """What can be read of a clip whose child died: its sound may be what ends it."""
        spec = self._read.keywords["spec"]
        if not spec.sound:
            return _died(request.video, died)
        try:
            result = run_apart(functools.partial(self._read, spec=spec._replace(sound=False)), request)
        except WorkerDied:
            return _died(request.video, died)
        if isinstance(result, ClipRead):
            result.media.note(f"its sound is left out: it ended the process that decoded it ({decoder_fault(died)})")
        return result

    def _listen(self, read: ClipRead, video: Path) -> ClipRead:
        """The clip with the words of the first of the sources from `speech` on that has some."""
        for source in self._heard:
            if source != "speech":
                options = {"language": self._read.keywords["subtitle_language"], "span": read.media.span}
                found = run_apart(functools.partial(subtitle_of, sources=(source,), **options), video)
                read.media.note(*found.notes)
                text = found.text
            else:
                sound = run_apart(read_sound, video)
                text = "" if sound is None else self._transcribe(sound)
            if text:
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
) -> ClipRead | UserError:
    """Read a clip, in a child process."""
    try:
        media = read_clip(request, config, spec, frame_rule=frame_rule)
        subtitle = request.subtitle
        if not subtitle:
            found = subtitle_of(request.video, subtitle_sources, language=subtitle_language, span=media.span)
            subtitle = found.text
            media.note(*found.notes)
        return ClipRead(request.name, media, subtitle)
    except UserError as error:
        return error
    except MemoryError:
        return UserError(f"{request.video}: does not fit into the memory; cut it, or make it smaller")
    except Exception as error:  # of a decoder, on a file that nobody has thought of
        reason = f"{type(error).__name__}: {first_line(error)}"
        return UserError(f"{request.video}: cannot be read ({reason}); write it anew with ffmpeg, or leave it out")


def _died(video: Path, died: WorkerDied) -> UserError:
    return UserError(f"{video}: it ended the process that decoded it: {decoder_fault(died)}")
