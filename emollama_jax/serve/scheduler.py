"""The engine thread: the one that computes, for all requests together.

It goes round: whatever has come is encoded and scored in batches, answers take free slots, a chunk of tokens is decoded
for all of them, and whoever asked is told. When nothing runs, the first request waits a moment for others to share its
batch.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from emollama_jax.errors import UserError, as_user_error, first_line
from emollama_jax.features.encode import in_batches
from emollama_jax.infer.engine import Engine
from emollama_jax.infer.inputs import VideoClips
from emollama_jax.infer.predictor import label_fields, task_questions
from emollama_jax.infer.slots import TokenEvent
from emollama_jax.serve.cache import ClipCache, EncodedClip
from emollama_jax.serve.errors import ApiError, engine_down
from emollama_jax.serve.jobs import Encoded, Event, Failed, Finished, Job, Scored, Started, Tokens
from emollama_jax.serve.metrics import Metrics
from emollama_jax.serve.programs import programs, serving_shapes
from emollama_jax.serve.seen import seen_of
from emollama_jax.text.prompts import Turn

GATHER_S = 0.02  # that a request waits for others when the engine is idle
BATCH = 16  # requests that are taken in one round
DEFECTS = 3  # errors in a row that no request explains, after which the engine counts as broken
STALE_S = 60.0  # without a heartbeat; compiling a large model's programs may take so long

Work = Callable[[list[Job]], None]


class Scheduler:
    """Runs jobs on one engine, in a thread of its own.

    Args:
        videos: the engine's encoders.
        on_death: is called, in the engine thread, when it ends by an error; all jobs have been told then.
    """

    def __init__(
        self,
        engine: Engine,
        videos: VideoClips,
        *,
        slots: int,
        cache: ClipCache,
        metrics: Metrics,
        on_death: Callable[[BaseException], None] = lambda error: None,
    ):
        self._engine, self._videos, self._cache, self._metrics = engine, videos, cache, metrics
        self._slots, self._on_death, self._shapes = slots, on_death, serving_shapes(engine, slots)
        self._batcher = engine.make_slot_batcher(slots, self._shapes)
        self._to_compile: Iterator[Callable[[], Any]] | None = None
        self._when_compiled: Callable[[], None] = lambda: None
        self._inbox: deque[Job] = deque()
        self._changed = threading.Condition()
        self._unfinished: set[Job] = set()
        self._running: dict[int, Job] = {}  # by the number of their request
        self._stops, self._defects, self.death = False, 0, None
        self.heartbeat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what has not been answered is told so."""
        with self._changed:
            self._stops = True
            self._changed.notify()
        self._thread.join()

    def submit(self, job: Job) -> None:
        """Have a job done. Raises ApiError where the engine is down."""
        with self._changed:
            if self._stops or not self._thread.is_alive():
                raise engine_down()
            self._inbox.append(job)
            self._unfinished.add(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Drop a job, if it is not done; its slot is free before the next tokens."""
        with self._changed:
            job.is_over = True
            self._unfinished.discard(job)
            self._changed.notify()

    def compile(self, label_engines: Sequence[Engine], when_done: Callable[[], None]) -> None:
        """Compile the programs that requests need, in turn with requests. `when_done` is called in the engine thread,
        also where that ends before.

        Args:
            label_engines: with the labels and orders that are asked for.
        """
        with self._changed:
            self._when_compiled = when_done
            self._to_compile = programs(self._engine, self._videos, self._batcher, self._shapes, label_engines)
            self._changed.notify()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._stops and self.death is None

    @property
    def is_responsive(self) -> bool:
        """Whether the thread lives and has gone round lately."""
        return self.is_alive and time.monotonic() - self.heartbeat < STALE_S

    def _run(self) -> None:
        try:
            with self._engine.on_mesh():
                while not self._stops:
                    self.heartbeat = time.monotonic()
                    self._go_round(self._arrivals())
                    self._compile_some()
        except BaseException as error:
            self.death = error
            logging.getLogger(__name__).exception("the engine thread has ended")
        with self._changed:
            self._stops = True
            left = list(self._unfinished)
        for job in left:
            self._tell(job, Failed(engine_down()))
        self._when_compiled()
        if self.death is not None:
            self._on_death(self.death)

    def _arrivals(self) -> list[Job]:
        """The jobs that have come, after a moment for others where the engine is idle."""
        with self._changed:
            if not (self._inbox or self._batcher.busy or self._stops or self._to_compile):
                self._changed.wait(1.0)
            if self._inbox and not self._batcher.busy:
                end = time.monotonic() + GATHER_S
                while len(self._inbox) < BATCH and not self._stops and (left := end - time.monotonic()) > 0:
                    self._changed.wait(left)
            jobs = [self._inbox.popleft() for _ in range(min(len(self._inbox), BATCH))]
            self._metrics.waiting.set(len(self._inbox))
        return jobs

    def _go_round(self, jobs: list[Job]) -> None:
        self._attempt(jobs, self._encode)
        self._attempt(jobs, self._make_soft_tokens)
        for job in jobs:
            self._attempt([job], self._measure)
        asked: dict[tuple[Engine, int], list[Job]] = {}
        for job in jobs:
            if job.scores_labels and not job.is_over:
                asked.setdefault((job.engine, self._shapes.prompt(job.prompt_tokens)), []).append(job)
        for alike in asked.values():
            for batch in in_batches(alike):
                self._attempt(batch, self._score_labels)
        for job in jobs:
            if job.generation is not None:
                self._attempt([job], self._submit_generation)
            elif not job.is_over:
                self._tell(job, Finished(True, job.timings_s))
        for number in [number for number, job in self._running.items() if job.is_over]:
            self._batcher.cancel(number)
            del self._running[number]
            self._metrics.cancelled.inc()
        if self._batcher.busy:
            for event in self._batcher.step():
                self._pass_on(event)
        self._metrics.busy_slots.set(min(len(self._running), self._slots))

    def _compile_some(self) -> None:
        """Compile the next program. One that cannot be, as the device cannot hold its inputs, waits for a request."""
        if self._to_compile is None:
            return
        try:
            call = next(self._to_compile, None)
            if call is not None:
                call()
                return
        except Exception as error:
            logging.getLogger(__name__).warning("a program is not compiled beforehand: %s", first_line(error))
            return
        self._to_compile = None
        self._when_compiled()

    def _tell(self, job: Job, event: Event) -> None:
        """Tell who asked; after the last event nothing more is done for a job."""
        if isinstance(event, Finished | Failed):
            self._unfinished.discard(job)
            job.is_over = True
        if isinstance(event, Finished):
            self._defects = 0
        job.emit(event)

    def _attempt(self, jobs: list[Job], work: Work) -> None:
        """Do the work for all jobs; where it fails for several, each is tried alone."""
        jobs = [job for job in jobs if not job.is_over]
        if not jobs:
            return
        try:
            work(jobs)
        except Exception as error:
            if len(jobs) == 1:
                self._tell(jobs[0], Failed(self._error(error)))
                return
            for job in jobs:
                self._attempt([job], work)

    def _error(self, error: Exception) -> ApiError:
        if isinstance(error, ApiError):
            return error
        known = as_user_error(error)
        if isinstance(known, UserError) and known.exit_code == 2:
            return ApiError(422, str(known), "cannot_answer")
        if known is not None:
            return ApiError(503, str(known), "no_memory", retry_after_s=5)
        self._defects += 1
        if self._defects >= DEFECTS:
            raise error
        logging.getLogger(__name__).error("a job failed", exc_info=error)
        return ApiError(500, f"a defect of the server ({type(error).__name__}: {first_line(error)})", "defect")

    def _encode(self, jobs: list[Job]) -> None:
        """Encode the clips that are new; one that several ask about is encoded once."""
        for job in jobs:
            job.encoded = job.clip.encoded or self._cache.get(job.clip.key)
            self._metrics.clips.labels("cached" if job.encoded else "encoded").inc()
        new = {job.clip.key: job.clip for job in jobs if job.encoded is None}
        encoded: dict[str, EncodedClip] = {}
        seconds = 0.0
        if new:
            start = time.perf_counter()
            for batch in in_batches(list(new.values())):
                reads = [clip.read for clip in batch]
                clips = self._videos.encode([clip.item for clip in batch], reads)
                for opened, clip, read in zip(batch, clips, reads, strict=True):
                    encoded[opened.key] = EncodedClip(clip, read.clip_info, seen_of(read.media))
            seconds = (time.perf_counter() - start) / len(new)
            self._metrics.stage("encode", time.perf_counter() - start)
        for job in jobs:
            read = job.clip.read if job.clip.encoded is None else None
            job.timings_s = {**(read.seconds if read else {}), "encode": 0.0 if job.encoded else seconds}
            job.encoded = job.encoded or encoded[job.clip.key]
            self._tell(job, Encoded(job.encoded))

    def _make_soft_tokens(self, jobs: list[Job]) -> None:
        by_modalities: dict[str, dict[str, Job]] = {}
        for job in jobs:
            modalities = job.engine.predictor.modalities
            if modalities not in job.encoded.soft:
                by_modalities.setdefault(modalities, {})[job.clip.key] = job
        start = time.perf_counter()
        for modalities, chosen in by_modalities.items():
            for batch in in_batches(list(chosen.values())):
                soft = batch[0].engine.predictor.soft_tokens([job.encoded.clip for job in batch])
                for job, tokens in zip(batch, np.asarray(soft), strict=True):
                    job.encoded.soft[modalities] = tokens
        seconds = time.perf_counter() - start
        for job in jobs:
            # Two jobs of a batch may have encoded clips of their own for the same file.
            modalities = job.engine.predictor.modalities
            if modalities not in job.encoded.soft:
                job.encoded.soft[modalities] = by_modalities[modalities][job.clip.key].encoded.soft[modalities]
            job.soft = job.encoded.soft[modalities]
            job.timings_s["encode"] += seconds / len(jobs)
            self._cache.put(job.clip.key, job.encoded)
        self._metrics.cache_bytes.set(self._cache.nbytes)

    def _score_labels(self, jobs: list[Job]) -> None:
        """Score the labels of jobs that ask for the same ones, in prompts of one padded length."""
        engine, start = jobs[0].engine, time.perf_counter()
        clips, soft = [job.clip_input for job in jobs], jax.device_put(np.stack([job.soft for job in jobs]))
        length = self._shapes.prompt(jobs[0].prompt_tokens)
        scores = engine.predictor.labels(clips, soft, [job.history for job in jobs], length=length)
        seconds = time.perf_counter() - start
        self._metrics.stage("label", seconds)
        if not np.isfinite(scores.probabilities).all():  # before anybody is told: each is tried alone then
            message = "the labels' probabilities are not finite; compute in float32 (config.llama.compute_dtype)"
            raise ApiError(500, message, "not_finite")
        for row, job in enumerate(jobs):
            fields = label_fields(scores, row)
            job.timings_s["label"] = seconds / len(jobs)
            by_order = scores.by_order[row]
            spread = zip(by_order.min(axis=0).tolist(), by_order.max(axis=0).tolist(), strict=True)
            self._tell(job, Scored(fields, dict(zip(scores.labels, spread, strict=True)), job.prompt_tokens))

    def _submit_generation(self, jobs: list[Job]) -> None:
        (job,), asked = jobs, jobs[0].generation
        turns = [*job.history, Turn(asked.question)]
        settings = {"generate": asked.generate, "seed": asked.seed, "logprobs": asked.logprobs}
        request = job.engine.predictor.request(job.clip_input, jax.device_put(job.soft), turns, **settings)
        job.started_s = time.perf_counter()
        self._tell(job, Started(len(request.prompt.tokens)))
        self._running[self._batcher.submit(request)] = job

    def _measure(self, jobs: list[Job]) -> None:
        """Count the tokens of a job's prompts. Raises ApiError where they are too many."""
        (job,) = jobs
        questions = [task_questions(job.engine.config.prompt)[0]] if job.scores_labels else []
        questions += [job.generation.question] if job.generation is not None else []
        for question in reversed(questions):  # what is kept is the length of the labels' prompt
            turns = [*job.history, Turn(question)]
            job.prompt_tokens = len(job.engine.predictor.prompt(job.clip_input, turns).tokens)
            if job.prompt_tokens > (longest := job.engine.config.data.sequence_length):
                message = f"a prompt of {job.prompt_tokens} tokens, and {longest} are taken"
                message += "; shorten the subtitle or the question"
                raise ApiError(422, message, "context_length_exceeded")

    def _pass_on(self, event: TokenEvent) -> None:
        job = self._running.get(event.request)
        if job is None:
            return
        seconds = time.perf_counter() - job.started_s
        if event.tokens:
            self._metrics.tokens.inc(len(event.tokens))
            if not job.has_tokens:
                self._metrics.first_token.observe(seconds)
                job.has_tokens = True
            self._tell(job, Tokens(event.tokens, event.logprobs))
        if event.completion is not None:
            del self._running[event.request]
            self._metrics.stage("generate", seconds)
            timings = job.timings_s | {"generate": seconds}
            self._tell(job, Finished(event.completion.ended, timings))
