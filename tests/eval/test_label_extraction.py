"""Labels out of descriptions: by a chat model asked once, by a model's likelihood, and by words alone."""

import numpy as np
import pytest

from emollama_jax import cli
from emollama_jax.eval.judge import Judge
from emollama_jax.eval.label_extraction import extract_by_judge, extract_by_likelihood, extract_by_words
from emollama_jax.eval.label_files import read_label_sets, write_descriptions
from emollama_jax.eval.wheels import EmotionWheels
from emollama_jax.io.chat import ChatConfig
from tests.data.prepared import TOKENIZER
from tests.eval.judge_server import said, serve
from tests.eval.wheel_tables import write_tables
from tests.models.tiny import random_llama, tiny_config

TEXTS = {
    "a": "<think>Sad?</think>She beams, glad and gladly heard.",
    "b": "He is not glad, he is furious.",
    "c": "",
    "d": "x",
}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    return EmotionWheels.load(write_tables(tmp_path_factory.mktemp("wheels") / "tables"))


def answer(question, n):
    description = question.rpartition("Description:")[2].strip()
    assert "think" not in question
    replies = {"She": "['Glad', 'proud.']", "He": "None.", "x": "I'm sorry, I cannot say."}
    return said(next(reply for begin, reply in replies.items() if description.startswith(begin)))


def test_a_chat_model_is_asked_once(tmp_path):
    with serve(answer) as server:
        judge = Judge(ChatConfig(address=server.address, model="m"), tmp_path / "cache")
        found = extract_by_judge(judge, TEXTS)
        assert found.labels == {"a": ("glad", "proud"), "b": (), "c": (), "d": ()}
        assert found.failed == ("d",) and found.how == "by the chat model m"
        asked = sum(server.asked.values())
        assert extract_by_judge(judge, TEXTS) == found and sum(server.asked.values()) == asked == 3


@pytest.mark.smoke
def test_words_of_a_text(wheels):
    found = extract_by_words(TEXTS, wheels)
    assert found.labels == {"a": ("glad", "gladly"), "b": ("furious",), "c": (), "d": ()}
    assert "for smoke runs" in found.how


def test_the_likeliest_words_are_the_same_every_time():
    model = random_llama(tiny_config(vocab_size=640))
    words = ("happy", "sad", "very sad", "angry")
    find = lambda texts, **options: extract_by_likelihood(model, TOKENIZER, texts, words, **options).labels
    found = find(TEXTS, share=1e-9, most=3)
    assert found["c"] == () and len(found["a"]) == 3 and set(found["a"]) < set(words)
    assert find(TEXTS, share=1e-9, most=3) == found == find(dict(reversed(TEXTS.items())), share=1e-9, most=3)
    best = find(TEXTS, share=1.0)
    assert all(best[name] == found[name][:1] for name in "abd")
    assert (
        len({find({"t": text}, share=1e-9, most=4)["t"] for text in ("oh dear", "he laughs", "why, oh why", "no")}) > 1
    )


def test_descriptions_on_the_command_line(tmp_path, capsys, monkeypatch):
    tables = write_tables(tmp_path / "tables")
    write_descriptions(tmp_path / "r.npz", {"a": "She beams, glad.", "b": "He frowns."})
    (tmp_path / "truth.csv").write_text("name,openset\na,glad\nb,fury\n")
    argv = ["evaluate", "open", "--predictions", tmp_path / "r.npz", "--list", tmp_path / "truth.csv"]
    argv = [*map(str, argv), "--wheels", str(tables), "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    assert "holds descriptions, not labels; say with --extract" in capsys.readouterr().err
    assert cli.main([*argv, "--extract", "words"]) == 0
    assert read_label_sets(tmp_path / "out/r-openset.npz") == {"a": ("glad",), "b": ()}
    assert "(for smoke runs, not for tables)" in (tmp_path / "out/evaluation.md").read_text()
    assert cli.main([*argv, "--extract", "likelihood"]) == 2
    assert "--extract likelihood: name the run" in capsys.readouterr().err
    with serve(lambda question, n: said("glad")) as server:
        monkeypatch.setenv("EMOLLAMA_JUDGE_ADDRESS", server.address)
        monkeypatch.setenv("EMOLLAMA_JUDGE_MODEL", "m")
        assert cli.main([*argv, "--extract", "chat"]) == 0
    assert np.load(tmp_path / "out/r-openset.npz")["fileitems"].tolist() == ["[glad]", "[glad]"]
    assert "Labels: by the chat model m." in (tmp_path / "out/evaluation.md").read_text()
