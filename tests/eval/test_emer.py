"""EMER's protocol, against a judge of our own making, and the scores without a judge."""

import pytest

from emollama_jax.eval import emer, lexical
from emollama_jax.eval.emer import Overlap, clue_overlap, label_overlap
from emollama_jax.eval.judge import Judge
from emollama_jax.eval.report import comparison
from emollama_jax.io.chat import ChatConfig, ChatReply
from tests.eval.judge_server import said, serve


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def judge_of(server, cache):
    return Judge(ChatConfig(address=server.address, model="m", attempts=1), cache)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("8", (8, "scored")),
        ("Score: 7.5 of 10.", (7.5, "scored")),
        ("8/10", (8, "scored")),
        ("10", (10, "scored")),
        ("**3**", (3, "scored")),
        ("0", (None, "unparsable")),
        ("11", (None, "unparsable")),
        ("-5", (None, "unparsable")),
        ("eight", (None, "unparsable")),
        ("", (None, "unparsable")),
        ("h2o", (None, "unparsable")),
        ("I'm sorry, but I can't do that.", (None, "refused")),
        ("As an AI model I do not judge.", (None, "refused")),
        ("Sorry: 4", (4, "scored")),
        ("8/10, because 3 clues fit", (8, "scored")),
        ("8 (out of 10)", (8, "scored")),
        ("9.5/10.0", (9.5, "scored")),
        ("得分为8分", (8, "scored")),
        ("８", (8, "scored")),
        ("<think>They share 3 clues of 5.</think> 8", (8, "scored")),
        ("<answer>7</answer></s>", (7, "scored")),
        ("On a scale of 1 to 10, I would give an 8", (None, "unparsable")),
        ("The 2 descriptions overlap: 9", (None, "unparsable")),
        ("8/10 or 7/10", (None, "unparsable")),
        ("8-9", (None, "unparsable")),
        ("7,5", (None, "unparsable")),
        ("8/100", (None, "unparsable")),
        ("80%", (None, "unparsable")),
        ("<think>I would say 8", (None, "unparsable")),
    ],
)
def test_a_score_is_the_only_number_or_one_of_ten(tmp_path, monkeypatch, reply, expected):
    monkeypatch.setattr(Judge, "ask", lambda self, questions, progress: [ChatReply("answered", reply)])
    judge = Judge(ChatConfig(address="http://127.0.0.1:9", model="m"), tmp_path)
    overlap = clue_overlap(judge, ["a"], ["b"])
    assert (overlap.scores[0], overlap.statuses[0]) == expected


@pytest.mark.smoke
def test_clue_overlap(tmp_path):
    replies = {"smile": "9", "frown": "4", "shrug": "no idea", "stare": "I cannot help with that"}

    def reply(question, n):
        first, second = question.split("First description:")[1].split("Second description:")
        return said(replies[second.split()[0]] if "reference" in first else "1")

    predictions = ["smile {x}", "frown", "shrug", "stare", "smile again"]
    with serve(reply) as server:
        overlap = clue_overlap(judge_of(server, tmp_path), [f"reference {i}" for i in range(5)], predictions)
        assert sum(server.asked.values()) == 5
    assert overlap.scores == (9, 4, None, None, 9)
    assert overlap.statuses == ("scored", "scored", "unparsable", "refused", "scored")
    assert overlap.mean == pytest.approx(22 / 3)
    assert [overlap.count(status) for status in ("scored", "unparsable", "refused", "failed")] == [3, 1, 1, 0]
    assert server.requests[0][0]["temperature"] == 0


def test_label_overlap_is_of_the_texts_mapped_to_emotion_words(tmp_path):
    maps = {"beams": "happy", "joyous": "happy, delighted", "mutters": "I'm sorry, I can't", "blank": " . "}

    def reply(question, n):
        if "Description:\n" in question:
            return said(maps[question.split("Description:\n")[1].strip()])
        first, second = (line.split(": ")[1] for line in question.splitlines() if " list: " in line)
        return said("9" if (first, second) == ("happy", "happy, delighted") else "2")

    references = ["beams", "beams", "mutters", "beams", "joyous"]
    predictions = ["joyous", "mutters", "beams", "blank", "beams"]
    with serve(reply) as server:
        overlap = label_overlap(judge_of(server, tmp_path), references, predictions)
        assert sum(server.asked.values()) == 4 + 2  # each text once, and two pairs that have words
    assert overlap == Overlap((9.0, None, None, None, 2.0), ("scored", "refused", "refused", "unparsable", "scored"))


def test_clips_that_the_judge_never_answered_are_counted(tmp_path):
    with serve(lambda question, n: said("5")) as server:
        pass
    for overlap in (clue_overlap, label_overlap):
        found = overlap(judge_of(server, tmp_path), ["a", "b"], ["c", "d"])
        assert found == Overlap((None, None), ("failed", "failed")) and found.mean is None


def test_no_clips(tmp_path):
    judge = Judge(ChatConfig(address="http://127.0.0.1:9", model="m"), tmp_path)
    assert clue_overlap(judge, [], []) == label_overlap(judge, [], []) == Overlap((), ())


def test_the_published_rows():
    table = comparison(emer.HEADINGS, {"clue": 8.0, "label": 6.5}, emer.PUBLISHED, scale=1.0)
    assert table[0] == "|  | Clue Overlap | Label Overlap |"
    assert table[2:4] == ["| **emollama_jax** | 8.00 | 6.50 |", "| Emotion-LLaMA | 7.83 | 6.25 |"]
    assert len(table) == 10


def test_label_hit_rate():
    predictions = ["She is Happy.", "He looks unhappy", "mixed, feelings!", "a sad sad man"]
    assert lexical.label_hit_rate(["happy", "happy", "mixed feelings", "angry"], predictions) == 0.5
    with pytest.raises(ValueError, match="no clips"):
        lexical.label_hit_rate([], [])


def test_clue_word_overlap():
    assert lexical.clue_word_overlap(["The raised brows and a smile"], ["Smile: raised BROWS"]) == 1
    assert lexical.clue_word_overlap(["raised brows"], ["the lowered brows"]) == 0.5
    assert lexical.clue_word_overlap(["brows", "tears"], ["brows", ""]) == 0.5
    assert lexical.clue_word_overlap(["the"], ["a"]) == 0
    with pytest.raises(ValueError, match="no clips"):
        lexical.clue_word_overlap([], [])
