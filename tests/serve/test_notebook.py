"""The engine of notebooks, asking a real server as the engine behind it would answer."""

import sys

import pytest

from emollama_jax.errors import UserError
from emollama_jax.text.prompts import Turn

pytest.importorskip("IPython", reason="no IPython: pip install 'emollama_jax[test]'")

from emollama_jax.notebook.served import ServedEngine, serve, share_demo


def test_it_answers_as_the_engine_does(running, engine, videos):
    served = ServedEngine(running.url)
    expected = engine.label(videos[0], subtitle="Oh.")
    found = served.label(videos[0], subtitle="Oh.")
    assert found.label == expected.label and found.subtitle == "Oh."
    assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-5)
    question, history = "[reason] Why?", (("[reason] What?", "A smile."),)
    for before in ((), history):
        pieces = list(served.stream(videos[0], question, history=before))
        turns = [Turn(*pair) for pair in before]
        assert "".join(pieces) == "".join(engine.stream(videos[0], question, history=turns))
    assert served.ask(videos[0], question).answer == engine.ask(videos[0], question).answer


def test_what_is_wrong_is_one_line(running, tmp_path):
    served = ServedEngine(running.url)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(UserError):
        served.label(tmp_path / "broken.mp4")
    with pytest.raises(UserError, match="cannot read"):
        served.label(tmp_path / "none.mp4")
    with pytest.raises(UserError, match="start the server again"):
        ServedEngine("http://127.0.0.1:9").label(tmp_path / "broken.mp4")


@pytest.fixture
def python(tmp_path, monkeypatch):
    """Returns a function that has `emollama` run a shell script."""

    def use(text: str) -> None:
        for name, line in (("emollama", "exit 0"), ("python", text)):
            (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
            (tmp_path / name).chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return use


def test_a_server_that_does_not_start_says_why(python):
    python(f'exec {sys.executable} -m emollama_jax "$3" --config tiny --trained nowhere')
    said = []
    with pytest.raises(UserError, match="emollama serve did not start: emollama serve: error: .*no such file"):
        serve(log=said.append)
    assert said


def test_the_page_is_shared_behind_a_new_password(python):
    lines = "echo 'emollama: and at https://x.example'; echo \"$@\"; echo 'emollama: warm after 1 s'; exec sleep 60"
    python(lines)
    said = []
    command = share_demo("--trained", "runs/x", log=said.append)
    command.stop()
    asked, told = said[1], said[-1]
    password = told.rpartition(" ")[2]
    assert told.startswith("the page is at https://x.example; user clip") and len(password) >= 12
    assert asked == f"-m emollama_jax demo --share --auth clip:{password} --trained runs/x"
    python(lines.replace("https://x.example", "no public address: the tunnel could not be opened"))
    with pytest.raises(UserError, match="the tunnel could not be opened; run the cell again"):
        share_demo(log=said.append)
