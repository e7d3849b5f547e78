"""`emollama predict --server` writes what `emollama predict` writes, and says what a server does not do."""

import json
from pathlib import Path

import httpx
import pytest

from emollama_jax import cli
from emollama_jax.errors import UserError
from emollama_jax.serve.remote import RemoteEngine
from tests.serve.test_emotions import send, timeless


def predict(*argv: object) -> int:
    return cli.main(["predict", *map(str, argv)])


def test_a_folder_is_answered_by_a_server(running, videos, tmp_path, capsys):
    folder = tmp_path / "clips"
    folder.mkdir()
    for path in videos:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "broken.mp4").write_bytes(b"no clip")
    out = tmp_path / "out.jsonl"
    argv = [folder, "--server", running.url, "--out", out]
    assert predict(*argv) == 1
    assert "4 clips: 3 answered, 1 failed (read 1), 3 without a subtitle" in capsys.readouterr().err
    lines = {Path(line["video"]).stem: line for line in map(json.loads, out.read_text().splitlines())}
    assert lines["broken"]["stage"] == "read" and "of no known kind" in lines["broken"]["error"]
    for path in videos:
        line, alone = lines[path.stem], send(running, path)
        names = ["answer", "subtitle", "clip"]
        assert {name: line[name] for name in names} == {name: timeless(alone)[name] for name in names}
        assert line["probabilities"] == pytest.approx(alone["probabilities"], abs=2e-6)
        assert list(line) == [
            "name",
            "video",
            "status",
            "answer",
            "probabilities",
            "subtitle",
            "clip",
            "fingerprint",
        ] + ["timings_s"]
    before = out.read_bytes()
    assert predict(*argv, "--resume") == 1 and out.read_bytes() == before
    assert predict(*argv, "--resume", "--orders", 2) == 2 and "orders" in capsys.readouterr().err


def test_a_question_is_asked_and_printed(running, videos, engine, capsys):
    assert predict(videos[0], "--server", running.url, "--question", "[reason] Why?") == 0
    line = json.loads(capsys.readouterr().out)
    assert line["answer"] == engine.ask(videos[0], "[reason] Why?").answer and "probabilities" not in line


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--frame", "peak"], "--frame: the server has its own"),
        (["--trained", "runs/x"], "--trained: the server has its own"),
        (["--question", "a", "--question", "b"], "one question a clip"),
        (["--api-key", "wrong", "--server", "ftp://x"], "no address"),
        (["--server", "http://127.0.0.1:9"], "is the server running?"),
    ],
)
def test_what_does_not_go_with_a_server(running, videos, capsys, argv, said):
    assert predict(videos[0], "--server", running.url, *argv) == 2
    assert said in capsys.readouterr().err
    assert predict(videos[0], "--api-key", "k", "--config", "tiny") == 2
    assert "--api-key: goes with --server" in capsys.readouterr().err


def test_a_busy_server_is_asked_again_and_a_refusal_is_one_line():
    replies = [httpx.Response(429, headers={"Retry-After": "0"})] * 2
    replies.append(httpx.Response(401, json={"error": {"message": "no API key"}}))
    engine = RemoteEngine("http://server", transport=httpx.MockTransport(lambda request: replies.pop(0)))
    with pytest.raises(UserError, match="HTTP 401: no API key; check --server and --api-key"):
        engine.identity()
    assert not replies
