"""The judge against a server on this machine that does all that servers do."""

import json
import time
from email.utils import formatdate
from types import SimpleNamespace

import pytest

from emollama_jax.errors import UserError
from emollama_jax.eval.judge import Judge
from emollama_jax.io.chat import ChatConfig, ChatReply
from tests.eval.judge_server import Reply, said, serve

KEY = "sk-very-secret-0123456789"
TROUBLES = {
    "good": [],
    "busy": [Reply(429, b"slow down", {"Retry-After": "0"})] * 2,
    "broken": [Reply(500, b"oops"), Reply(503, b""), Reply(502, b"<html>")],
    "late": [Reply(200, b"{}", delay_s=0.6)],
    "garbage": [
        Reply(200, b"<html>hello"),
        Reply(200, b'{"choices": []}'),
        Reply(200, b'{"choices": [{"message": 3}]}'),
    ],
    "cut": [Reply(200, b'{"cho', {"Content-Length": "5000"})],
}


@pytest.fixture(autouse=True)
def near_and_impatient(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def troubled(question, n):
    """Each kind of trouble first, then "7 for QUESTION"; "refuse" and "filtered" are declined."""
    kind = question.split()[0]
    if kind == "refuse":
        return said(None, refusal="I will not")
    if kind == "filtered":
        return said("", finish_reason="content_filter")
    troubles = TROUBLES[kind]
    return troubles[n] if n < len(troubles) else said(f"7 for {question}")


def judge_of(server, cache, **settings):
    settings = {"model": "m", "key": KEY, "timeout_s": 0.3, **settings}
    return Judge(ChatConfig(address=server.address, **settings), cache)


def test_nothing_is_lost_and_nothing_answered_twice(tmp_path):
    kinds = [*TROUBLES, "refuse", "filtered"]
    questions = [f"{kind} {i}" for i in range(5) for kind in kinds]
    questions += questions[::3]  # some come again
    told = []
    with serve(troubled) as server:
        answers = judge_of(server, tmp_path).ask(questions, lambda *done: told.append(done))
        for question, answer in zip(questions, answers, strict=True):
            if question.startswith(("refuse", "filtered")):
                assert answer.status == "refused"
            else:
                assert answer == ChatReply("answered", f"7 for {question}")
        assert set(server.answered.values()) == {1} and set(server.answered) == set(questions)
        for kind, troubles in TROUBLES.items():
            assert {server.asked[question] for question in questions if question.startswith(kind)} == {
                len(troubles) + 1
            }
        assert told == [(i + 1, 40) for i in range(40)]

        asked = sum(server.asked.values())
        assert judge_of(server, tmp_path).ask(questions[::-1]) == answers[::-1]  # out of the cache
        assert sum(server.asked.values()) == asked


@pytest.mark.smoke
def test_what_is_sent(tmp_path, monkeypatch):
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):  # openai's own variables stay here
        monkeypatch.setenv(f"OPENAI_{name}", "theirs")
    with serve(troubled) as server:
        judge_of(server, tmp_path).ask(["good one"])
        judge_of(server, tmp_path / "other", key="").ask(["good one"])
    (request, headers), (_, without) = server.requests
    assert request == {"model": "m", "temperature": 0, "messages": [{"role": "user", "content": "good one"}]}
    assert headers["path"] == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert "Authorization" not in without and not any("theirs" in str(sent) for sent in server.requests)


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    questions = [f"good {i}" for i in range(40)]

    def interrupt(done, total):
        if done == 10:
            raise KeyboardInterrupt

    with serve(lambda question, n: troubled(question, n)._replace(delay_s=0.01)) as server:
        with pytest.raises(KeyboardInterrupt):
            judge_of(server, tmp_path, concurrency=3).ask(questions, interrupt)
        before = sum(server.answered.values())
        assert 10 <= before < 40
        answers = judge_of(server, tmp_path, concurrency=3).ask(questions)
    assert [answer.text for answer in answers] == [f"7 for {question}" for question in questions]
    assert set(server.answered.values()) == {1} and len(server.answered) == 40


def test_a_damaged_answer_on_disk_is_asked_for_again(tmp_path):
    with serve(troubled) as server:
        (answer,) = judge_of(server, tmp_path).ask(["good one"])
        (file,) = tmp_path.iterdir()
        file.write_text(file.read_text()[:-20])
        assert judge_of(server, tmp_path).ask(["good one"]) == [answer]
        assert server.asked["good one"] == 2
        assert json.loads(file.read_text())["text"] == "7 for good one"


def test_other_judges_are_asked_themselves(tmp_path):
    with serve(troubled) as one, serve(troubled) as other:
        for judge in (judge_of(one, tmp_path), judge_of(one, tmp_path, model="n"), judge_of(other, tmp_path)):
            judge.ask(["good one"])
            judge.ask(["good one"])
        assert (one.asked["good one"], other.asked["good one"]) == (2, 1)
    assert len(list(tmp_path.iterdir())) == 3


def test_no_more_requests_at_once_than_allowed(tmp_path):
    with serve(lambda question, n: troubled(question, n)._replace(delay_s=0.03)) as server:
        judge_of(server, tmp_path, concurrency=3).ask([f"good {i}" for i in range(12)])
    assert server.busiest == 3


@pytest.mark.parametrize("as_date", [False, True])
def test_the_server_says_how_long_to_wait(tmp_path, monkeypatch, as_date):
    def reply(question, n):
        asks = [formatdate(time.time() + 50, usegmt=True) if as_date else "50", "soon"]
        return Reply(429, b"", {"Retry-After": asks[n]}) if n < 2 else said("5")

    paused = []
    with serve(reply) as server:
        judge = judge_of(server, tmp_path)
        monkeypatch.setattr("openai._base_client.time", SimpleNamespace(sleep=paused.append, time=time.time))
        assert judge.ask(["good one"]) == [ChatReply("answered", "5")]
    assert paused[0] == pytest.approx(50, abs=2) and paused[1] < 0.1


def test_a_server_that_asks_for_a_long_wait_is_left_to_the_next_run(tmp_path):
    with serve(lambda question, n: Reply(429, b"", {"Retry-After": "1000"}) if n < 1 else said("5")) as server:
        (answer,) = judge_of(server, tmp_path).ask(["good one"])
        assert answer.status == "failed" and "429" in answer.text
        assert judge_of(server, tmp_path).ask(["good one"]) == [ChatReply("answered", "5")]


def test_patience_ends_and_the_next_run_asks_again(tmp_path):
    with serve(lambda question, n: Reply(500, f"no {KEY}".encode()) if n < 3 else said("5")) as server:
        (answer,) = judge_of(server, tmp_path, attempts=3).ask(["good one"])
        assert answer == ChatReply("failed", "HTTP 500 Internal Server Error no ***")
        assert server.asked["good one"] == 3 and not list(tmp_path.iterdir())
        assert judge_of(server, tmp_path).ask(["good one"]) == [ChatReply("answered", "5")]


def test_a_question_that_is_refused_as_such_is_not_sent_again(tmp_path):
    reply = lambda question, n: Reply(400, b'{"error": "too long"}') if question == "long" else said("5")
    with serve(reply) as server:
        answers = judge_of(server, tmp_path).ask(["long", "short"])
    assert [answer.status for answer in answers] == ["failed", "answered"]
    assert answers[0].text == 'HTTP 400 Bad Request {"error": "too long"}' and server.asked["long"] == 1


@pytest.mark.parametrize(
    ("reply", "remedy"),
    [
        (Reply(401, f"wrong key {KEY}".encode()), "check the key"),
        (Reply(404, b"no such model"), "check the address and the model"),
        (Reply(402, b"Insufficient balance"), "check the account's credit"),
        (Reply(429, b'{"error": {"code": "insufficient_quota"}}', {"Retry-After": "0"}), "check the account's credit"),
        (Reply(307, b"", {"Location": "http://127.0.0.1:9/elsewhere"}), "check the address"),
    ],
)
def test_a_judge_that_cannot_be_asked_ends_the_run(tmp_path, reply, remedy):
    with serve(lambda question, n: said("5") if question == "first" else reply) as server:
        judge_of(server, tmp_path).ask(["first"])
        with pytest.raises(UserError, match=remedy) as caught:
            judge_of(server, tmp_path).ask(["first", *map(str, range(50))])
        assert KEY not in str(caught.value)
        assert sum(server.asked.values()) < 51
        assert judge_of(server, tmp_path).ask(["first"]) == [ChatReply("answered", "5")]
        assert server.asked["first"] == 1


def test_no_question_is_asked_in_vain(tmp_path):
    """Of a server that answers nothing, the first questions tell it."""
    with serve(lambda question, n: Reply(400, b'{"error": "no"}')) as server:
        with pytest.raises(UserError, match="none of 16 questions got an answer: HTTP 400 .*no"):
            judge_of(server, tmp_path, concurrency=2).ask([str(i) for i in range(80)])
        assert sum(server.asked.values()) < 40


def test_a_model_that_takes_no_temperature(tmp_path):
    refusal = Reply(400, b'{"error": {"message": "Unsupported value: temperature", "param": "temperature"}}')
    with serve(lambda question, n: said("5")) as server:
        server.accept = lambda request: "temperature" not in request
        server.refusal = refusal
        answers = judge_of(server, tmp_path, attempts=1, concurrency=1).ask(["a", "b", "c"])
        assert [answer.text for answer in answers] == ["5", "5", "5"]
        assert sum(server.asked.values()) == 4  # one of them was refused


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (Reply(400, b'{"error": {"code": "content_filter", "message": "management policy"}}'), "refused"),
        (Reply(400, b'{"code": "data_inspection_failed"}'), "refused"),
        (Reply(400, b'{"error": "context too long"}'), "failed"),
    ],
)
def test_questions_that_are_filtered_are_refused(tmp_path, reply, status):
    with serve(lambda question, n: reply) as server:
        (answer,) = judge_of(server, tmp_path).ask(["a"])
        assert answer.status == status and server.asked["a"] == 1


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "8"}], "8"),
        ([{"type": "thinking", "thinking": "3 clues"}, {"type": "text", "text": "It is "}, {"text": "8"}], "It is 8"),
        ([], ""),
    ],
)
def test_content_in_parts(tmp_path, content, text):
    with serve(lambda question, n: said(content)) as server:
        assert judge_of(server, tmp_path).ask(["a"]) == [ChatReply("answered", text)]
        assert server.asked["a"] == 1


def test_a_server_that_is_not_there(tmp_path):
    with serve(troubled) as server:
        pass
    (answer,) = judge_of(server, tmp_path, attempts=2).ask(["good one"])
    assert answer.status == "failed" and "refused" in answer.text


def test_the_key_goes_nowhere_but_to_the_server(tmp_path, caplog):
    with caplog.at_level("DEBUG"), serve(lambda question, n: troubled(question, n)) as server:
        judge = judge_of(server, tmp_path, attempts=1)
        judge.ask(["good one", "broken one"])
    assert "no answer of the judge" in caplog.text
    everything = [caplog.text, repr(judge.config), *(file.read_text() for file in tmp_path.iterdir())]
    assert len(everything) == 3 and not any("secret" in text for text in everything)


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot keep answers in .*choose another folder"):
        Judge(ChatConfig(address="https://judge/v1", model="m"), tmp_path / "file" / "cache")
