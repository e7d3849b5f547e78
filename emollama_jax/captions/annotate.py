"""Annotates clips in stages, each of which is kept for each clip with everything that made it (`stage_store`).

    units       blendshapes of the main face, of clips without action units, where there is a mesh (`face_units`)
    peak        the frame of the strongest expression and the label, from units or a list of labels
    read        the peak frame as a picture, the measured voice, the words
    picture     what the peak frame shows, by a describer
    expression  phrases for the active units
    voice       the tone in words: by a describer, or as measured against the voices of all clips
    coarse      the parts joined
    fine        an inference from them, by a describer

A clip without a label is dropped and counted, one that cannot be read is a failure. Neither stops the others.
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from emollama_jax.captions import expression, parts, peak_and_label, voice
from emollama_jax.captions.annotation import AnnotateConfig, Annotation, AnnotationResult, SourceClip
from emollama_jax.captions.describers import Describer, Scene, measured_picture
from emollama_jax.captions.face_units import FaceUnits, measure_faces
from emollama_jax.captions.mer_factory import TOOL
from emollama_jax.captions.parts import Parts, coarse_caption
from emollama_jax.captions.peak_and_label import find_peak_and_label
from emollama_jax.captions.stage_store import ClipStages, StageStore, stage_key
from emollama_jax.errors import UserError
from emollama_jax.io.atomic import write_bytes
from emollama_jax.io.checksums import file_digest
from emollama_jax.io.stopwatch import Stopwatch
from emollama_jax.io.worker_pool import WorkerDied, map_ahead
from emollama_jax.media.audio import is_silent, read_sound
from emollama_jax.media.clip import ClipRequest, ReadSpec
from emollama_jax.media.clip_reader import ClipRead, ClipReader
from emollama_jax.media.subtitle_files import find_subtitle_files
from emollama_jax.media.subtitles import Transcribe
from emollama_jax.media.unit_rules import rules_identity

VERSION = 1  # counted up when the stage `read` would give something else
TEXTS = {"picture": "picture", "voice": "voice", "fine": "caption_fine"}  # kind -> field of an annotation
PATIENCE = 16  # clips without a single text, until no others are described
FRAME = 448  # pixels of the pictures that are kept, both ways

Progress = Callable[[str, int, int], None]


def annotate(
    clips: Sequence[SourceClip],
    out: Path,
    config: AnnotateConfig,
    *,
    describers: Mapping[str, Describer] = MappingProxyType({}),
    transcribe: Transcribe | None = None,
    workers: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> AnnotationResult:
    """Annotates clips; goes on where it was stopped.

    Args:
        out: gets the folders `stages`, `frames` and, with a mesh, `blendshapes`.
        describers: who describes the peak frame (`picture`) and the `voice`, by measurement where they are not given,
            and who infers the `fine` caption, which is not written without.
        transcribe: listens, where the subtitle sources name speech.
        workers: child processes that read clips; 0 reads in this one.
        progress: is told of each clip that a stage of some length is done with: the stage, how many are done, and of
            how many that are to be done.

    Raises:
        UserError: an endpoint refuses the key, the address or the model. Finished work is kept.
    """
    run = _Run(out, config, progress)
    with run.clock("units"):
        run.measure_units(clips, workers)
    with run.clock("peak"):
        for clip in clips:
            run.find_peak(clip)
    with run.clock("read"):
        run.read_clips(run.alive(clips), transcribe, workers)
    alive = run.alive(clips)
    with run.clock("picture"):
        run.ask(alive, "picture", describers.get("picture") or measured_picture(config.clip.mesh))
    with run.clock("voice"):
        heard = [clip for clip in alive if clip.given.voice or run.annotations[clip.name].voice_measures]
        run.ask(heard, "voice", describers.get("voice"))
    with run.clock("words"):
        run.put_into_words(alive)
    with run.clock("fine"):
        run.ask(alive, "fine", describers.get("fine"))
    return AnnotationResult([run.annotations[clip.name] for clip in clips], run.clock.seconds)


class _Run:
    def __init__(self, out: Path, config: AnnotateConfig, progress: Progress):
        self.config, self.clock, self._progress = config, Stopwatch(), progress
        self._frames, self._tables, self._store = out / "frames", out / "blendshapes", StageStore(out / "stages")
        self._measured: dict[str, FaceUnits | UserError] = {}
        self._stages: dict[str, ClipStages] = {}
        self.annotations: dict[str, Annotation] = {}

    def alive(self, clips: Sequence[SourceClip]) -> list[SourceClip]:
        """Those that are neither dropped nor failed."""
        return [clip for clip in clips if self.annotations[clip.name].status == "annotated"]

    # The peak and the label

    def measure_units(self, clips: Sequence[SourceClip], workers: int) -> None:
        for clip in clips:
            self._stages[clip.name] = self._store.open(clip.name)
        if self.config.clip.mesh:
            self._measured = measure_faces(
                [clip for clip in clips if clip.units is None],
                self._tables,
                self._stages,
                self.config.clip,
                workers=workers,
                progress=functools.partial(self._progress, "units"),
            )

    def find_peak(self, clip: SourceClip) -> None:
        one = self.annotations[clip.name] = Annotation(clip.name, str(clip.video))
        stages, measured = self._stages[clip.name], self._measured.get(clip.name)
        settings = [rules_identity(self.config.rules), self.config.active_from, self.config.labels]
        settings += [self.config.clip.person, clip.label, clip.given.label, clip.given.peak_index]
        try:
            if isinstance(measured, UserError):
                raise measured
            table = measured.table if measured else clip.units
            used = [table and file_digest(table), measured and measured.peak_index, *settings]
            make = functools.partial(find_peak_and_label, clip, measured, self.config)
            _fill(one, _kept(stages, "peak", stage_key(peak_and_label.VERSION, *used), make))
        except (UserError, OSError) as error:
            one.status, one.reason = "failed", str(error)

    # What is seen and heard

    def read_clips(self, clips: Sequence[SourceClip], transcribe: Transcribe | None, workers: int) -> None:
        keys, to_read = {}, []
        for clip in clips:
            one = self.annotations[clip.name]
            try:
                keys[clip.name] = key = self._read_key(clip, one)
            except OSError as error:
                one.status, one.reason = "failed", f"cannot be read ({error.strerror})"
                continue
            value = self._stages[clip.name].get("read", key)
            if value is not None and self.frame(clip).exists():
                _fill(one, value)
            else:
                to_read.append(clip)
        reader = ClipReader(
            self.config.clip,
            ReadSpec(frame=FRAME, face=None, motion=None, sound=False),
            frame_rule="peak",
            subtitle_sources=self.config.subtitle_sources,
            subtitle_language=self.config.subtitle_language,
            transcribe=transcribe,
            workers=workers,
        )
        requests = (ClipRequest(c.name, c.video, c.subtitle, self.annotations[c.name].peak_index) for c in to_read)
        reads = reader.read(requests)
        voices = map_ahead(_measure_voice, (clip.video for clip in to_read), workers)
        for done, (clip, read, measures) in enumerate(zip(to_read, reads, voices, strict=True), 1):
            one = self.annotations[clip.name]
            if isinstance(read, UserError):
                one.status, one.reason = "failed", str(read)
            else:
                value = self._read_value(clip, read, measures)
                self._stages[clip.name].put("read", keys[clip.name], value)
                _fill(one, value)
            self._progress("read", done, len(to_read))

    def _read_key(self, clip: SourceClip, one: Annotation) -> str:
        sources, language = self.config.subtitle_sources, self.config.subtitle_language
        beside = find_subtitle_files(clip.video, language) if "file" in sources else []
        words = clip.subtitle or [sources, language, [[path.name, file_digest(path)] for path in beside]]
        settings = dataclasses.asdict(self.config.clip)
        return stage_key(VERSION, voice.VERSION, file_digest(clip.video), one.peak_index, words, settings)

    def _read_value(
        self, clip: SourceClip, read: ClipRead, measures: dict[str, float] | str | WorkerDied | None
    ) -> dict[str, Any]:
        picture = io.BytesIO()
        Image.fromarray(read.media.frame).save(picture, "PNG")
        write_bytes(self.frame(clip), picture.getvalue())
        info = read.media.clip_info
        notes = list(info.get("notes", []))
        if isinstance(measures, str | WorkerDied):
            notes.append(f"its sound cannot be decoded ({measures})")
            measures = None
        return {
            "peak_index": info["frame"],
            "frames": info["frames"],
            "subtitle": read.subtitle,
            "voice_measures": measures,
            "notes": notes,
        }

    def frame(self, clip: SourceClip) -> Path:
        """The file of the clip's peak frame."""
        return self._frames / f"{clip.name}.png"

    # In words

    def put_into_words(self, clips: Sequence[SourceClip]) -> None:
        """Fills in the expression, the voice and the coarse caption. The norms of voices are those of these clips."""
        norms = voice.find_norms([m for clip in clips if (m := self.annotations[clip.name].voice_measures)])
        for clip in clips:
            one, stages = self.annotations[clip.name], self._stages[clip.name]
            key = stage_key(expression.VERSION, [*one.units], self.config.seed)
            one.expression = _kept(
                stages,
                "expression",
                key,
                lambda one=one: expression.describe_units(one.units, one.name, self.config.seed),
            )
            key = stage_key(voice.VERSION, one.voice_measures, norms)
            if not one.voice:
                one.voice = _kept(stages, "tone", key, lambda one=one: voice.describe_voice(one.voice_measures, norms))
                one.describers["voice"] = "measured"
            key = stage_key(parts.VERSION, dataclasses.asdict(_parts(one)))
            one.caption_coarse = _kept(stages, "coarse", key, lambda one=one: coarse_caption(_parts(one)))
            one.describers |= {"expression": "phrases", "coarse": "template"}

    # By describers

    def _take_given(self, clip: SourceClip, kind: str) -> bool:
        """Whether the text is given, which is taken then."""
        if not (text := getattr(clip.given, kind)):
            return False
        one = self.annotations[clip.name]
        setattr(one, TEXTS[kind], text)
        one.describers[kind] = TOOL
        return True

    def ask(self, clips: Sequence[SourceClip], kind: str, describer: Describer | None) -> None:
        """Has a describer make the text `kind` of each clip, several at a time; nothing is asked twice."""

        def work(clip: SourceClip) -> str:
            one, stages = self.annotations[clip.name], self._stages[clip.name]
            scene = Scene(self.frame(clip), clip.video, _parts(one))
            file = {"picture": scene.frame, "voice": scene.video}.get(kind)
            about = file_digest(file) if file else dataclasses.asdict(scene.parts)
            key = stage_key(describer.identity, about)
            value = stages.get(kind, key)
            if value is None:
                reply = describer.describe(scene)
                value = {"status": reply.status, "text": reply.text}
                if reply.status != "failed":
                    stages.put(kind, key, value)
            one.describers[kind] = describer.name
            if value["status"] == "answered":
                setattr(one, TEXTS[kind], value["text"])
            else:
                one.unanswered[kind] = f"{value['status']}: {value['text']}"
            return value["status"]

        statuses: list[str] = []
        clips = [clip for clip in clips if not self._take_given(clip, kind)]
        if not clips or describer is None:
            return
        with ThreadPoolExecutor(describer.concurrency) as pool:
            try:
                for future in as_completed([pool.submit(work, clip) for clip in clips]):
                    statuses.append(future.result())
                    self._progress(kind, len(statuses), len(clips))
                    if len(statuses) == PATIENCE and set(statuses) == {"failed"}:
                        reasons = (one.unanswered.get(kind) for one in self.annotations.values())
                        raise UserError(
                            f"{describer.name}: none of {PATIENCE} clips got a text: {next(filter(None, reasons))}"
                        )
            except BaseException:  # an interruption, too
                describer.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _measure_voice(video: Path) -> dict[str, float] | str | None:
    """The measures of a clip's voice, None where there is none, or why its sound cannot be decoded. Runs in a child."""
    try:
        sound = read_sound(video)
    except UserError as error:
        return str(error)
    return None if sound is None or is_silent(sound) else voice.measure_voice(sound)


def _fill(one: Annotation, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        setattr(one, name, value)


def _kept(stages: ClipStages, stage: str, key: str, make: Callable[[], Any]) -> Any:
    """What is kept of a stage, or is made and kept now."""
    if (value := stages.get(stage, key)) is None:
        stages.put(stage, key, value := make())
    return value


def _parts(one: Annotation) -> Parts:
    return Parts(
        label=one.label,
        picture=one.picture,
        expression=tuple(one.expression),
        expression_by=one.units_by,
        voice=one.voice,
        subtitle=one.subtitle,
    )
