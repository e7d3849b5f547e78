"""A tiny engine behind a real server on the loopback address, and clips to ask it about."""

import asyncio
import contextlib
import dataclasses
import importlib.util
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from emollama_jax import Engine, cli
from emollama_jax.config import Config, GenerateConfig, load_config
from emollama_jax.synthetic.dataset import make_dataset
from tests.train.runs import LLAMA

PACKAGES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client", "httpx", "openai", "av")
NEED_NONE = ("test_settings.py",)
MISSING = [package for package in PACKAGES if not importlib.util.find_spec(package)]


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> None:
    """Skips the modules whose packages are missing, which could not be imported."""
    if MISSING and module_path.name not in NEED_NONE:
        pytest.skip(f"no {MISSING[0]}: pip install 'emollama_jax[serve,media,judge]'", allow_module_level=True)


class Running(NamedTuple):
    """A server in this process: its address, and what is behind it."""

    url: str
    service: Any
    client: Any
    """Of httpx, with the key where one is asked for."""


@pytest.fixture(scope="session")
def config() -> Config:
    config = load_config("tiny")
    small = {name: dataclasses.replace(getattr(config, name), num_layers=1) for name in ("mae", "videomae", "hubert")}
    return dataclasses.replace(
        config,
        **small,
        eva_vit=dataclasses.replace(config.eva_vit, num_layers=1),
        projectors=dataclasses.replace(config.projectors, feature_size=32),
        clip=dataclasses.replace(config.clip, max_faces=2, max_seconds=20.0),
        data=dataclasses.replace(config.data, sequence_length=256),
        generate=GenerateConfig(max_new_tokens=24),
    )


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    assert cli.main(["convert", str(LLAMA), str(folder), "--dtype", "float32"]) == 0
    return folder


@pytest.fixture(scope="session")
def engine(config, base) -> Engine:
    return Engine.load(config=config, base=base, random_encoders=True)


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> list[Path]:
    made = make_dataset(tmp_path_factory.mktemp("clips") / "clips", clips={"train": 3}, workers=1)
    return [made.video(spec) for spec in made.clips]


@contextlib.contextmanager
def serving(engine: Engine, *, with_demo: bool = False, **settings) -> Iterator[Running]:
    """A server of the engine in a thread, on a free port of the loopback address."""
    import httpx
    import uvicorn

    from emollama_jax.serve.app import make_app
    from emollama_jax.serve.server import PunctualProtocol
    from emollama_jax.serve.service import Service
    from emollama_jax.serve.settings import ServeSettings

    service = Service(engine, ServeSettings(**{"warmup": False, "slots": 4, **settings}))
    service.scheduler.start()
    app = make_app(service)
    if with_demo:
        from emollama_jax.serve.demo.mount import mount_demo

        app = mount_demo(app, service)
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, http=PunctualProtocol, log_level="warning", timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    key = settings.get("api_key")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False) as client:
            yield Running(url, service, client)
    finally:
        server.should_exit = True
        thread.join()
        service.close()


@pytest.fixture(scope="session")
def running(engine) -> Iterator[Running]:
    with serving(engine) as found:
        yield found
