"""What the page's buttons do and show, without a browser; and the page as a process of its own."""

import asyncio
import functools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from emollama_jax import cli
from emollama_jax.serve.demo import figures
from emollama_jax.serve.demo.session import EMOTION, REASON, Asked, Talk, ask
from emollama_jax.serve.errors import ApiError
from emollama_jax.serve.service import Service
from emollama_jax.serve.settings import ServeSettings
from emollama_jax.text.prompts import Turn
from tests.serve.test_process import arguments  # noqa: F401


@pytest.fixture
def service(engine):
    service = Service(engine, ServeSettings(warmup=False, slots=2))
    service.scheduler.start()
    yield service
    service.close()


def press(service, *asked: Asked) -> list:
    """All that is shown while these are asked one after another."""

    async def run():
        shown, talk = [], Talk()
        for one in asked:
            async for now in ask(service, one, talk):
                shown.append(now)
                talk = now.talk
        return shown

    return asyncio.run(run())


def test_buttons_make_a_conversation_about_the_clip(service, engine, videos):
    clip = {"video": str(videos[0]), "subtitle": "Oh no.", "orders": 3}
    shown = press(service, Asked(**clip, task=EMOTION), Asked(**clip, question="Are you sure?"))
    label = engine.replace(orders=3).label(videos[0], subtitle="Oh no.")
    talk = shown[-1].talk
    assert [who for who, _ in talk.said] == ["user", "assistant"] * 2
    assert talk.said[1][1] == f"{label.label} ({label.probabilities[label.label]:.0%})"
    history = [talk.turns[0]]
    assert history[0].answer == label.label and history[0].request.startswith("[emotion] ")
    answer = engine.ask(videos[0], "Are you sure?", subtitle="Oh no.", history=history).answer
    assert talk.said[3][1] == answer and talk.turns[1] == Turn("Are you sure?", answer)
    pieces = [now.talk.said[-1][1] for now in shown if len(now.talk.said) == 4]
    assert len({*pieces}) > 3 and all(answer.startswith(piece) or piece == "…" for piece in pieces)
    assert sum(now.bars is not None for now in shown) == 1  # a follow-up asks for no label


def test_another_clip_or_other_words_begin_anew(service, videos):
    first = Asked(str(videos[0]), task=EMOTION)
    for other in (Asked(str(videos[1]), task=REASON), Asked(str(videos[0]), "Oh no.", task=REASON)):
        shown = press(service, first, other)
        assert len(shown[-1].talk.turns) == 1 and shown[-1].talk.turns[0].request.startswith("[reason] ")
        assert any(now.bars for now in shown[-8:]) and any(now.seen for now in shown)


def test_words_that_are_heard_fill_the_field(engine, videos, monkeypatch):
    """What is left in the field then goes on with the conversation; other words begin anew, and are not heard again."""
    listened = []

    def transcribe(waveform: np.ndarray) -> str:
        listened.append(len(waveform))
        return "I am fine."

    heard = functools.partial(engine.videos, subtitle_sources=("speech",), transcribe=transcribe)
    monkeypatch.setattr(engine, "videos", heard)
    service = Service(engine, ServeSettings(warmup=False, slots=2))
    service.scheduler.start()
    try:
        clip = str(videos[0])
        shown = press(service, Asked(clip, task=EMOTION), Asked(clip, "I am fine.", question="Are you sure?"))
        typed = press(service, Asked(clip, "Oh no.", task=EMOTION))
    finally:
        service.close()
    assert {now.subtitle for now in shown if now.subtitle is not None} == {"I am fine."}
    assert any("“I am fine.” (heard)" in (now.seen or "") for now in shown)
    label = engine.label(clip, subtitle="I am fine.")
    assert shown[-1].talk.said[1][1] == f"{label.label} ({label.probabilities[label.label]:.0%})"
    assert len(shown[-1].talk.turns) == 2
    assert any("“Oh no.” (typed)" in (now.seen or "") for now in typed)
    assert len(listened) == 1 and listened[0] > 16_000


@pytest.mark.parametrize(
    "asked, said",
    [
        (Asked("", task=EMOTION), "no clip yet"),
        (Asked("nowhere.mp4", task=EMOTION), "no longer there"),
        (Asked(__file__, task=EMOTION), "no video"),
        (Asked("VIDEO"), "no question yet"),
        (Asked("VIDEO", labels="a", task=EMOTION), "give two labels or more"),
        (Asked("VIDEO", "so " * 300, task=EMOTION), "shorten the subtitle"),
    ],
)
def test_what_is_missing_is_said(service, videos, asked, said):
    asked = Asked(**{**vars(asked), "video": asked.video.replace("VIDEO", str(videos[0]))})
    with pytest.raises(ApiError, match=said):
        press(service, asked)


def test_pictures_and_words_are_shown_as_what_they_are():
    shown = figures.bars({"<b>": 0.75, "sad": 0.25}, {"<b>": (0.5, 1.0), "sad": (0.0, 0.5)}, 2)
    assert "<b>" not in shown and "&lt;b&gt; 75%" in shown and "left:50.00%;width:50.00%" in shown
    wave = figures.waveform(np.array([(-0.5, 0.5), (-0.1, 0.2)], np.float32))
    assert "0.0,2.0" in wave and wave.count(",") == 4


def test_a_page_for_others_needs_a_password(arguments, capsys, monkeypatch):  # noqa: F811
    given = [argument for argument in arguments if argument not in ("--no-demo", "--port", "0")]
    for argv, said in (
        (["--share"], "give --auth, or --insecure"),
        (["--host", "0.0.0.0"], "--insecure"),
        (["--auth", "me"], "is not USER:PASSWORD"),
    ):
        assert cli.main(["demo", *given, "--port", "7999", *argv]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_is_a_process_of_its_own(arguments):  # noqa: F811
    pytest.importorskip("gradio", reason="no gradio: pip install 'emollama_jax[serve]'")
    given = [argument for argument in arguments if argument not in ("--no-demo", "--port", "0")]
    command = [
        sys.executable,
        "-m",
        "emollama_jax",
        "demo",
        *given,
        "--port",
        "7998",
        "--no-warmup",
        "--auth",
        "me:secret",
    ]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, env={**os.environ}, stderr=subprocess.PIPE, text=True) as process:
        url = next(found[1] for line in process.stderr if (found := re.search(r"the page is at (\S+)", line)))
        assert httpx.get(f"{url}config", trust_env=False).status_code == 401
        login = httpx.post(f"{url}login", data={"username": "me", "password": "secret"}, trust_env=False)
        assert login.status_code == 200
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(60) == 0
