"""The chat-completions client: its settings and the kinds of content. What it does when a server fails is in
tests/eval/test_judge.py."""

import base64
import sys

import pytest

from emollama_jax.errors import UserError
from emollama_jax.io.chat import ChatClient, ChatConfig, ChatReply, audio_part, image_part, text_part
from tests.eval.judge_server import said, serve

KEY = "sk-very-secret-0123456789"


def test_messages_of_text_images_and_sound(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    parts = [text_part("What?"), image_part(b"\x89PNG"), audio_part(b"RIFF")]
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": parts}]
    with serve(lambda question, n: said("a cat")) as server:
        client = ChatClient(ChatConfig(address=server.address, model="m"))
        assert client.complete(messages, temperature=0.5) == ChatReply("answered", "a cat")
    ((request, _),) = server.requests
    assert request == {"model": "m", "temperature": 0.5, "messages": messages}
    url = request["messages"][1]["content"][1]["image_url"]["url"]
    assert base64.b64decode(url.removeprefix("data:image/png;base64,")) == b"\x89PNG"


def test_without_openai_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install 'emollama_jax\[judge\]'"):
        ChatClient(ChatConfig(address="https://judge/v1", model="m"))


@pytest.mark.smoke
def test_settings_from_the_environment(monkeypatch):
    for name, value in {"ADDRESS": "https://judge.example/v1", "MODEL": "m", "KEY": f"{KEY}\n"}.items():
        monkeypatch.setenv(f"EMOLLAMA_JUDGE_{name}", value)
    config = ChatConfig.from_environment("judge", model="other")
    assert (config.address, config.model, config.key) == ("https://judge.example/v1", "other", KEY)
    monkeypatch.delenv("EMOLLAMA_JUDGE_KEY")
    assert ChatConfig.from_environment("judge").key == ""
    monkeypatch.delenv("EMOLLAMA_JUDGE_ADDRESS")
    with pytest.raises(UserError, match="no address of a judge; set EMOLLAMA_JUDGE_ADDRESS"):
        ChatConfig.from_environment("judge")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"address": "ftp://judge"}, "judge.address='ftp://judge': give a web address"),
        ({"address": f"https://me:{KEY}@judge/v1"}, "judge.address: give the address alone"),
        ({"address": f"https://judge/v1?key={KEY}"}, "judge.address: give the address alone"),
        ({"key": f"{KEY}\nX-Other: 1"}, "judge.key: holds white space"),
        ({"key": f"{KEY}é"}, "judge.key: holds white space"),
        ({"concurrency": 0}, "judge.concurrency=0: must be at least 1"),
        ({"attempts": 0}, "judge.attempts=0: must be at least 1"),
        ({"timeout_s": 0.0}, "judge.timeout_s=0.0: must be above 0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        ChatConfig.from_environment("judge", **{"address": "https://judge/v1", "model": "m", **settings})
    assert KEY not in str(caught.value)
