"""A server process: sockets, signals, warm-up, and the way it ends."""

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from emollama_jax.errors import UserError
from emollama_jax.infer.engine import Engine
from emollama_jax.serve.app import make_app
from emollama_jax.serve.errors import ApiError
from emollama_jax.serve.jobs import Generation
from emollama_jax.serve.service import Service
from emollama_jax.serve.settings import ServeSettings
from emollama_jax.serve.uploads import MediaFile
from emollama_jax.synthetic.dataset import make_dataset

HEAD_SECONDS = 15.0  # for the head of a request to come
DIED = 1  # exit code after the engine's death


def bind(settings: ServeSettings) -> socket.socket:
    """Take the server's address, before anything large is loaded.

    Raises:
        UserError: it is taken, or not of this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((settings.host, settings.port))
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise UserError(
            f"cannot listen on {where} ({error.strerror or error}); give another --host or --port"
        ) from error
    bound.set_inheritable(False)
    return bound


def run_server(
    engine: Engine,
    settings: ServeSettings,
    bound: socket.socket,
    *,
    certificate: tuple[Path, Path | None] | None = None,
    add_demo: Callable[[FastAPI, Service], FastAPI] | None = None,
    log: Callable[[str], None] = lambda message: None,
) -> int:
    """Serve until a signal, or the death of the engine; return the exit code.

    SIGTERM and SIGINT stop the server from taking requests; those under way have `drain_seconds` to end. A second
    signal ends it at once.

    Args:
        certificate: files of the certificate and its key, for https.
        add_demo: mounts the demo.
        log: is told where the server is, and why it ends.
    """
    server: _Server | None = None
    service = Service(engine, settings, on_death=lambda error: server and server.end_soon())
    app = make_app(service)
    if add_demo is not None:
        app = add_demo(app, service)
    files = {} if certificate is None else {"ssl_certfile": certificate[0], "ssl_keyfile": certificate[1]}
    config = uvicorn.Config(
        app,
        http=PunctualProtocol,
        ws="none" if add_demo is None else "auto",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
        h11_max_incomplete_event_size=64 << 10,
        **files,
    )
    try:
        config.load()
    except OSError as error:
        raise UserError(f"--ssl-certfile: cannot be used ({error}); give a certificate and its key in PEM") from error
    server = _Server(config, service, log)
    service.scheduler.start()
    try:
        asyncio.run(server.serve_and_warm_up(bound))
    finally:
        service.close()
    if service.scheduler.death is not None:
        log(f"the engine has failed: {type(service.scheduler.death).__name__}: {service.scheduler.death}")
        return DIED
    return 0


class _Server(uvicorn.Server):
    """uvicorn's server, which ends with exit code 0 on a signal, and warms the engine up as it begins."""

    def __init__(self, config: uvicorn.Config, service: Service, log: Callable[[str], None]):
        super().__init__(config)
        self._service, self._log = service, log
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve_and_warm_up(self, bound: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        warming = asyncio.ensure_future(self._warm_up())
        try:
            await self.serve(sockets=[bound])
        finally:
            warming.cancel()
            await asyncio.gather(warming, return_exceptions=True)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            address = f"[{host}]" if ":" in host else host
            self._log(f"listening on {'https' if self.config.is_ssl else 'http'}://{address}:{port}")

    async def _warm_up(self) -> None:
        if not self._service.is_warm:
            await warm_up(self._service, self._log)
            self._service.is_warm = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.getsignal(number) for number in numbers}
        for number in numbers:
            loop.add_signal_handler(number, self._drain, number)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def _drain(self, number: int) -> None:
        if self._service.is_draining:
            self._log(f"{signal.Signals(number).name} again: ending at once")
            self.force_exit = True
        else:
            seconds = self._service.settings.drain_seconds
            self._log(f"{signal.Signals(number).name}: no more requests; those under way have {seconds:g} s")
        self._service.is_draining = self.should_exit = True

    def end_soon(self) -> None:
        """End the server, from any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(setattr, self, "should_exit", True)


class PunctualProtocol(H11Protocol):
    """Closes connections on which no request begins, or the head of one does not end, in time."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._close_late)

    def data_received(self, data: bytes) -> None:
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._close_late)
        super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()


async def warm_up(service: Service, log: Callable[[str], None]) -> None:
    """Ask about a made-up clip, and compile what other requests need; `log` is told how long it took."""
    start = time.monotonic()
    try:
        await _ask_about_made_up_clip(service)
        await service.compile()
    except ApiError as error:
        log(f"not warmed up: {error}")
    else:
        log(f"warm after {time.monotonic() - start:.0f} s")


async def _ask_about_made_up_clip(service: Service) -> None:
    with TemporaryDirectory(prefix="emollama-warm-up-") as folder:
        data = await asyncio.to_thread(make_dataset, Path(folder) / "clips", clips={"train": 1}, workers=1)
        path = data.video(data.clips[0])
        clip = await service.open_clip(MediaFile(path, "video", "warm-up", path.name))
    generate = service.generate_config(max_new_tokens=2)
    generation = Generation(question="[reason] Why?", generate=generate)
    await service.answer(clip, service.engine, scores_labels=True, generation=generation)
