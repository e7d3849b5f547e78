"""Puts the page on a server, or starts one for the page alone."""

import asyncio
import hmac
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from emollama_jax.errors import UserError, first_line
from emollama_jax.infer.engine import Engine
from emollama_jax.serve.demo.figures import STYLE
from emollama_jax.serve.demo.page import make_page
from emollama_jax.serve.server import DIED, warm_up
from emollama_jax.serve.service import Service
from emollama_jax.serve.settings import ServeSettings
from emollama_jax.synthetic.dataset import make_dataset

EXAMPLES = 3
FONT = ("system-ui", "sans-serif")  # none is fetched


def mount_demo(app: FastAPI, service: Service) -> FastAPI:
    """Mount the page at / of an application. Where the server asks for a key, the page does: as the password."""
    app.state.demo_files = files = _files()  # they are there as long as the application
    folder = files.name
    page = make_page(service, make_examples(Path(folder)))
    settings = service.settings
    auth = _takes_key(settings.api_key) if settings.api_key else None
    return gr.mount_gradio_app(app, page, "/", auth=auth, **page_options(service, folder))


def run_demo(
    engine: Engine,
    settings: ServeSettings,
    *,
    auth: tuple[str, str] | None = None,
    share: bool = False,
    log: Callable[[str], None] = lambda message: None,
) -> int:
    """Serve the page alone until a signal, or the death of the engine; return the exit code.

    Args:
        auth: user and password of visitors.
        share: whether gradio also opens a tunnel to the page.
        log: is told where the page is.

    Raises:
        UserError: the address is taken, or the tunnel cannot be opened.
    """
    ended = threading.Event()
    service = Service(engine, settings, on_death=lambda error: ended.set())
    service.scheduler.start()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: ended.set()) for number in numbers]
    try:
        with _files() as folder:
            page = make_page(service, make_examples(Path(folder)))
            options = {"server_name": settings.host, "server_port": settings.port, "auth": auth, "share": share}
            try:
                page.launch(prevent_thread_lock=True, quiet=True, **options, **page_options(service, folder))
            except (OSError, RuntimeError) as error:
                raise UserError(f"the page cannot be served: {first_line(error)}; try another --port") from error
            log(f"the page is at {page.local_url}")
            if share:
                log(f"and at {page.share_url or 'no public address: the tunnel could not be opened'}")
            if settings.warmup:
                threading.Thread(target=lambda: asyncio.run(warm_up(service, log)), daemon=True).start()
            ended.wait()
            service.is_draining = True
            page.close(verbose=False)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        service.close()
    if service.scheduler.death is not None:
        log(f"the engine has failed: {type(service.scheduler.death).__name__}: {service.scheduler.death}")
        return DIED
    return 0


def page_options(service: Service, folder: str) -> dict[str, Any]:
    """What `mount_gradio_app` and `launch` are both told."""
    return {
        "allowed_paths": [f"{folder}/examples"],
        "max_file_size": service.settings.max_upload,
        "show_error": True,
        "footer_links": [],
        "ssr_mode": False,
        "theme": gr.themes.Default(font=FONT, font_mono=("ui-monospace", "monospace")),
        "css": STYLE,
    }


def _files() -> tempfile.TemporaryDirectory:
    """A folder of this user's for the examples, and for what gradio keeps of clips for a while."""
    folder = tempfile.TemporaryDirectory(prefix="emollama-demo-")
    os.environ["GRADIO_TEMP_DIR"] = f"{folder.name}/uploads"  # gradio has no other setting for it
    return folder


def make_examples(folder: Path) -> list[Path]:
    """Draw clips to try."""
    made = make_dataset(folder / "examples", clips={"example": EXAMPLES}, seed=7, workers=1)
    return [made.video(clip) for clip in made.clips]


def _takes_key(key: str) -> Callable[[str, str], bool]:
    return lambda user, password: hmac.compare_digest(password.encode(), key.encode())
