"""The server as a process: it answers OpenAI's client as the library does, drains, dies aloud, and is not left open."""

import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import openai
import pytest

from emollama_jax import cli
from emollama_jax.config import to_dict
from tests.serve.test_chat import WHY, chat, clip_part, user

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def arguments(config, base, tmp_path_factory) -> list[str]:
    file = tmp_path_factory.mktemp("config") / "served.py"
    file.write_text(
        "import json\nfrom emollama_jax.config import from_dict\n"
        f"def get_config():\n    return from_dict(json.loads({json.dumps(to_dict(config))!r}))\n"
    )
    return [
        "--config",
        str(file),
        "--base",
        str(base),
        "--random-encoders",
        "--port",
        "0",
        "--no-demo",
        "--workers",
        "1",
    ]


class Server:
    """A server process; a context manager that ends it."""

    def __init__(self, arguments: list[str], *more: str, how: str = "lives", trust: ssl.SSLContext | bool = True):
        self.trust = trust
        command = [sys.executable, "-m", "tests.serve.process", how, *arguments, *more]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ})
        self.lines: list[str] = []
        self.url = ""
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"listening on (\S+)", line):
                self.url = found[1]
                break
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr))
        self._reader.start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()

    def openai(self) -> openai.OpenAI:
        client = httpx.Client(verify=self.trust, trust_env=False, timeout=120)
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="secret", max_retries=0, http_client=client)

    def wait_until(self, status: int) -> httpx.Response:
        """The first reply of /ready with this status."""
        while True:
            reply = httpx.get(f"{self.url}/ready", verify=self.trust, trust_env=False)
            if reply.status_code == status:
                return reply
            threading.Event().wait(0.1)


@pytest.mark.slow
def test_a_server_warms_up_answers_and_drains(arguments, engine, videos, tmp_path):
    """Over https. SIGTERM in the middle of a stream: it ends whole, and the process with 0."""
    trustme = pytest.importorskip("trustme", reason="no trustme: pip install 'emollama_jax[test]'")
    authority, file, trust = trustme.CA(), tmp_path / "server.pem", ssl.create_default_context()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(file)
    authority.configure_trust(trust)
    options = ["--api-key", "secret", "--slots", "2", "--ssl-certfile", str(file)]
    with Server(arguments, *options, trust=trust) as server, server.openai() as client:
        assert server.url.startswith("https://")
        server.wait_until(200)
        assert any("warm after" in line for line in server.lines)
        with pytest.raises(openai.AuthenticationError):
            chat(client.with_options(api_key="wrong"), user(clip_part(videos[0]), WHY))
        expected = engine.ask(videos[0], WHY).answer
        assert chat(client, user(clip_part(videos[0]), WHY)).choices[0].message.content == expected
        stream = iter(chat(client, user(clip_part(videos[0]), WHY), stream=True, max_tokens=200))
        chunks = [next(stream), next(stream)]
        server.process.send_signal(signal.SIGTERM)
        chunks += stream
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert chunks[-1].choices[0].finish_reason in ("length", "stop") and text.startswith(expected[:20])
        assert server.process.wait(60) == 0
        assert any("SIGTERM: no more requests" in line for line in server.lines)


@pytest.mark.slow
def test_a_dead_engine_is_told_and_ends_the_process(arguments, videos):
    with Server(arguments, "--no-warmup", how="dies") as server, server.openai() as client:
        statuses, errors = [], []

        def ask() -> None:
            try:
                chat(client, user(clip_part(videos[0]), WHY), max_tokens=200)
            except openai.APIStatusError as error:
                statuses.append(error.status_code)
                errors.append(error.body["code"])

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [503] * 3 and set(errors) == {"engine_down"}
        assert server.process.wait(60) == 1
        assert any("the engine has failed: RuntimeError: the device is lost" in line for line in server.lines)


def test_ready_says_that_the_engine_is_dead(engine, videos, monkeypatch):
    """/health is about the process, which lives until its supervisor or itself ends it."""
    from emollama_jax.infer.slots import SlotBatcher
    from tests.serve.conftest import serving

    with serving(engine) as server:
        assert server.client.get("/ready").status_code == 200
        monkeypatch.setattr(SlotBatcher, "step", lambda self: 1 / 0)
        answer = server.client.post(
            "/v1/emotions", files={"clip": videos[0].read_bytes()}, data={"question": "[reason] Why?"}
        )
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_down"
        ready = server.client.get("/ready")
        assert ready.status_code == 503 and "has stopped" in ready.json()["error"]["message"]
        assert server.client.get("/health").status_code == 200
        assert server.client.post("/v1/emotions", files={"clip": videos[0].read_bytes()}).status_code == 503


@pytest.mark.parametrize(
    "argv, code, said",
    [
        (["--host", "0.0.0.0"], 2, "give --api-key or EMOLLAMA_API_KEY, or --insecure"),
        (["--host", "no.such.host.invalid"], 2, "give --api-key"),
        (["--host", "203.0.113.1", "--api-key", "k"], 2, "cannot listen on 203.0.113.1"),
        (["--allowed-media-path", "/no/such/folder"], 2, "no such folder"),
        (["--ssl-keyfile", "x.pem"], 2, "goes with --ssl-certfile"),
        (["--allowed-media-domains", "a.example"], 2, "goes with --fetch allow"),
        (["--max-seconds", "0"], 2, "not a number above 0"),
        (["--max-seconds", "1000"], 2, "--max-seconds: max_seconds"),
        (["--modalities", "X"], 2, "modalities 'X'"),
        (["--base", "nowhere"], 3, "nowhere"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments, argv, code, said, capsys, monkeypatch):
    monkeypatch.delenv("EMOLLAMA_API_KEY", raising=False)
    assert cli.main(["serve", *arguments, *argv]) == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("emollama serve: error: ") and said in error


def test_a_taken_port_is_known_before_the_model_is_loaded(arguments, running, capsys):
    port = running.url.rpartition(":")[2]
    assert cli.main(["serve", *arguments, "--port", port, "--base", "nowhere"]) == 2
    assert "give another --host or --port" in capsys.readouterr().err
