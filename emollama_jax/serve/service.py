"""The engine for coroutines: clips are read in processes and asked about in one thread; every wait can be cancelled."""

import asyncio
import contextlib
import dataclasses
import functools
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

import anyio

from emollama_jax.config import GenerateConfig
from emollama_jax.errors import UserError
from emollama_jax.infer.answer import ClipAnswer
from emollama_jax.infer.engine import Engine
from emollama_jax.infer.inputs import Item
from emollama_jax.io.worker_pool import WorkerStopped
from emollama_jax.serve.cache import ClipCache
from emollama_jax.serve.errors import ApiError, bad_request, engine_down
from emollama_jax.serve.fetch import Fetcher
from emollama_jax.serve.jobs import Encoded, Event, Failed, Finished, Generation, Job, OpenClip, Scored
from emollama_jax.serve.metrics import Metrics
from emollama_jax.serve.programs import ENCODED
from emollama_jax.serve.scheduler import Scheduler
from emollama_jax.serve.settings import ServeSettings
from emollama_jax.serve.uploads import MediaFile, Uploads
from emollama_jax.text.prompts import Turn

ENGINES = 64  # label sets, orders and modalities whose engines are kept


class AskSettings(NamedTuple):
    """What a request changes of the engine; None is the engine's own."""

    labels: tuple[str, ...] | None = None
    emotion_question: str | None = None
    orders: int | None = None
    modalities: str | None = None


class Service:
    """Everything behind the routes and the demo.

    Args:
        on_death: see `Scheduler`.

    Attributes:
        usual_asks: what most requests change of the engine.
    """

    def __init__(
        self,
        engine: Engine,
        settings: ServeSettings,
        *,
        on_death: Callable[[BaseException], None] = lambda error: None,
    ):
        self.engine, self.settings, self.metrics = engine, settings, Metrics()
        identity = engine.identity()
        self.weights = identity["weights"] | {"encoders": identity["encoders"]}
        self._videos = engine.videos(sizes=ENCODED)
        self._cache = ClipCache(settings.cache_mib << 20)
        self.scheduler = Scheduler(
            engine,
            self._videos,
            slots=settings.slots,
            cache=self._cache,
            metrics=self.metrics,
            on_death=on_death,
        )
        self._fetcher = (
            Fetcher(domains=settings.allowed_media_domains, limit=settings.max_upload) if settings.fetch else None
        )
        self._engines: OrderedDict[AskSettings, Engine] = OrderedDict()
        self._engines_lock = threading.Lock()
        self._readers = anyio.CapacityLimiter(settings.readers)
        self._in_flight = 0
        self.is_warm, self.is_draining = not settings.warmup, False
        self.usual_asks = [AskSettings()]
        self.started = time.time()
        self.metrics.slots.set(settings.slots)

    @contextlib.contextmanager
    def admitted(self):
        """Within the block a request is one of those under way. Raises ApiError where they are too many."""
        if self.is_draining:
            raise ApiError(503, "the server is about to end; ask another, or later", "draining", retry_after_s=5)
        if self._in_flight >= self.settings.most_requests:
            message = f"{self._in_flight} requests are under way, as many as may; ask again later"
            raise ApiError(429, message, "queue_full", retry_after_s=self._retry_after())
        self._in_flight += 1
        self.metrics.in_flight.set(self._in_flight)
        try:
            yield
        finally:
            self._in_flight -= 1
            self.metrics.in_flight.set(self._in_flight)

    def _retry_after(self) -> int:
        """Seconds in which about half of what waits is likely to be done, of 1 to 30."""
        return min(30, max(1, round(self._in_flight / (2 * self.settings.slots))))

    @property
    def unready(self) -> str:
        """Why requests should go elsewhere; "" where they need not."""
        if not self.scheduler.is_alive:
            return "the engine has stopped"
        if self.is_draining:
            return "the server is about to end"
        if not self.scheduler.is_responsive:
            return "the engine has not answered for a while"
        return "" if self.is_warm else "the engine is warming up"

    def uploads(self) -> Uploads:
        """The files of one request; a context manager."""
        return Uploads(self.settings, self._fetcher)

    def engine_for(self, asked: AskSettings) -> Engine:
        """Return the engine with a request's settings. Raises ApiError for those that cannot be."""
        own = self.engine.config.prompt
        asked = asked._replace(
            labels=None if asked.labels == own.labels else asked.labels,
            emotion_question=None if asked.emotion_question == own.emotion_question else asked.emotion_question,
        )
        if asked == AskSettings():
            return self.engine
        with self._engines_lock:
            if asked not in self._engines:
                changes = {name: getattr(asked, name) for name in ("labels", "emotion_question")}
                try:
                    prompt = dataclasses.replace(own, **{k: v for k, v in changes.items() if v is not None})
                    engine = self.engine.replace(prompt=prompt, orders=asked.orders, modalities=asked.modalities)
                except (ValueError, UserError) as error:
                    raise bad_request(str(error), "labels" if "label" in str(error) else "modalities") from error
                self._engines[asked] = engine
                if len(self._engines) > ENGINES:
                    self._engines.popitem(last=False)
            self._engines.move_to_end(asked)
            return self._engines[asked]

    async def open_clip(
        self,
        picture: MediaFile | None,
        sound: MediaFile | None = None,
        *,
        subtitle: str = "",
        peak_index: int | None = None,
    ) -> OpenClip:
        """Read a clip of a video or picture, a sound, or both, in a child process.

        Raises:
            ApiError: 422, it cannot be read.
        """
        first = picture or sound
        video = picture.path if picture else None
        digest = "+".join(file.digest if file else "" for file in (picture, sound)) if sound else picture.digest
        item = Item(
            first.name, video, subtitle=subtitle, peak_index=peak_index, sound=sound and sound.path, digest=digest
        )
        # What is looked for beside the words that are given depends on whether there are some.
        key = f"{self._videos.fingerprint(dataclasses.replace(item, subtitle='x' if subtitle else ''))}"
        fingerprint = self._videos.fingerprint(item)
        if (known := self._cache.get(key)) is not None:
            return OpenClip(key, item, fingerprint, None, known)
        is_cancelled, start = threading.Event(), time.perf_counter()
        read_one = functools.partial(
            self._videos.read_one, item, self.settings.read_limits, is_cancelled=is_cancelled.is_set
        )
        try:
            read = await anyio.to_thread.run_sync(read_one, limiter=self._readers, abandon_on_cancel=True)
        except WorkerStopped as error:  # as the server ends
            raise ApiError(503, f"the clip was not read ({error})", "cancelled") from error
        finally:
            is_cancelled.set()
        self.metrics.stage("read", time.perf_counter() - start)
        if isinstance(read, UserError):
            message = str(read)
            for file in filter(None, (picture, sound)):
                message = message.replace(str(file.path), file.name)
            raise ApiError(422, message, "cannot_read")
        return OpenClip(key, item, fingerprint, read, None)

    @contextlib.asynccontextmanager
    async def asked(
        self,
        clip: OpenClip,
        engine: Engine,
        *,
        scores_labels: bool,
        history: Sequence[Turn] = (),
        generation: Generation | None = None,
    ) -> AsyncIterator[AsyncIterator[Event]]:
        """Ask about a clip; the block is given the events, and what is left of the work is dropped at its end."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def emit(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(clip, engine, emit, scores_labels=scores_labels, history=tuple(history), generation=generation)
        self.scheduler.submit(job)
        try:
            yield _until_finished(events)
        finally:
            if not job.is_over:
                self.scheduler.cancel(job)

    async def label(self, clip: OpenClip, engine: Engine, history: Sequence[Turn] = ()) -> ClipAnswer:
        """Score the labels of a clip: the answer of `Engine.label`."""
        return await self.answer(clip, engine, scores_labels=True, history=history)

    async def answer(
        self,
        clip: OpenClip,
        engine: Engine,
        *,
        scores_labels: bool,
        history: Sequence[Turn] = (),
        generation: Generation | None = None,
    ) -> ClipAnswer:
        """Answer whole: what an `Engine` would. Raises ApiError."""
        fields, tokens, timings = {}, [], {}
        asked = self.asked(clip, engine, scores_labels=scores_labels, history=history, generation=generation)
        async with asked as events:
            async for event in events:
                match event:
                    case Encoded():
                        clip_info, found = event.encoded.clip_info, event.encoded.clip.subtitle
                    case Scored():
                        fields = event.fields
                    case Finished():
                        timings = event.timings_s
                    case _:
                        tokens += getattr(event, "tokens", ())
        text = engine.tokenizer.decode(tokens).strip() if generation else fields["label"]
        return ClipAnswer(
            clip.item.name,
            text,
            answers=(text,) if generation else (),
            subtitle=clip.item.subtitle or found,
            clip_info=clip_info,
            fingerprint=clip.fingerprint,
            timings_s=timings,
            **fields,
        )

    def generate_config(self, **changes: float | int | None) -> GenerateConfig:
        """Return the experiment's sampling with a request's own settings. Raises ApiError for bad ones."""
        own = self.engine.config.generate
        try:
            return dataclasses.replace(own, **{name: value for name, value in changes.items() if value is not None})
        except ValueError as error:
            raise bad_request(str(error)) from error

    async def compile(self) -> None:
        """Compile the programs of usual requests, in turn with those that come meanwhile. Raises ApiError where the
        engine ends before."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def when_done() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(done.set)

        self.scheduler.compile([self.engine_for(asked) for asked in dict.fromkeys(self.usual_asks)], when_done)
        await done.wait()
        if not self.scheduler.is_alive:
            raise engine_down()

    def close(self) -> None:
        self.scheduler.stop()


async def _until_finished(events: asyncio.Queue) -> AsyncIterator[Event]:
    while True:
        event = await events.get()
        if isinstance(event, Failed):
            raise event.error
        yield event
        if isinstance(event, Finished):
            return
