"""Answers and labels in files: whoever wrote them, nothing is lost, guessed or counted twice."""

import numpy as np
import pytest

from emollama_jax import cli
from emollama_jax.data.recipe import Recipe
from emollama_jax.data.records import Records
from emollama_jax.errors import UserError
from emollama_jax.eval.answer_files import Answers, evaluate_answers, labels_of_records, read_answers, read_labels
from emollama_jax.eval.benchmarks import BENCHMARKS, Benchmark
from emollama_jax.text.labels import MERR
from tests.data.prepared import random_record, write_data

CALM = Benchmark(name="labels", labels=("Calm", "Tense"))


def write(path, text):
    path.write_text(text)
    return path


def labels_of(matched) -> list[str | None]:
    return [prediction.label for prediction in matched.evaluated.predictions]


def test_labels_are_found_alike_on_both_sides():
    answers = Answers(answers={"a": "calm</s>", "b": "Tense", "c": "She is TENSE."}, emotions={})
    matched = evaluate_answers(answers, {"a": "CALM", "b": "tense", "c": "Calm"}, CALM)
    assert [prediction.emotion for prediction in matched.evaluated.predictions] == ["Calm", "Tense", "Calm"]
    assert labels_of(matched) == ["Calm", "Tense", "Tense"]
    assert matched.evaluated.evaluation.scores["accuracy"] == pytest.approx(2 / 3)
    answers = Answers(answers={"a": "happiness", "b": "surprised"}, emotions={})
    matched = evaluate_answers(answers, {"a": "joy", "b": "surprised"}, BENCHMARKS["mer2023"])
    assert matched.evaluated.evaluation.scores["accuracy"] == 1


def test_numbers_are_labels_of_dfew_alone():
    answers = Answers(answers={"3": "neutral"}, emotions={})
    assert labels_of(evaluate_answers(answers, {"3": "3"}, BENCHMARKS["dfew"])) == ["neutral"]
    with pytest.raises(UserError, match="3 has the label '3', none of happy, .*; say from which number on"):
        evaluate_answers(answers, {"3": "3"}, BENCHMARKS["mer2023"])


def test_a_label_that_is_none_is_quoted_as_it_stands():
    with pytest.raises(UserError, match="a has the label 'Rage', none of Calm, Tense; add it, or mend it"):
        evaluate_answers(Answers(answers={"a": "calm"}, emotions={}), {"a": "Rage"}, CALM)


@pytest.mark.parametrize("text", ["a happy\nb sad\na sad\n", "7 happy\n00007.mp4 sad\n"])
def test_a_clip_that_is_listed_twice_is_refused(tmp_path, text):
    path = write(tmp_path / "truth.txt", text)
    with pytest.raises(UserError, match=r"truth.txt:\d: '.*' is the clip of line 1; keep one of them"):
        read_labels(path)
    with pytest.raises(UserError, match="keep one of them"):
        read_answers(path, ("answer", "emotion"))


OTHERS = ("answer", "emotion", "caption_fine")


@pytest.mark.parametrize(
    ("file", "text", "answers"),
    [
        ("submission.csv", "name,discrete\na,happy\nb,sad\n", {"a": "happy", "b": "sad"}),
        ("reference.csv", "names,chi_reasons\na,He is angry.\n", {"a": "He is angry."}),
        ("list.txt", "a happy\nb sad\n", {"a": "happy", "b": "sad"}),
        ("both.csv", "name,emotion,answer\na,happy,sad\n", {"a": "sad"}),
        ("nan.csv", "name,answer\na,nan\nb,sad\n", {"a": None, "b": "sad"}),
        ("openset.csv", "name,openset\na,\"['happy', 'sad']\"\n", {"a": "['happy', 'sad']"}),
    ],
)
def test_forms_of_answers(tmp_path, file, text, answers):
    found = read_answers(write(tmp_path / file, text), OTHERS)
    assert found.answers == answers
    assert found.emotions == ({"a": "happy"} if file == "both.csv" else {})


def test_a_list_of_labels_holds_no_answers(tmp_path, capsys):
    path = write(tmp_path / "p.txt", "a happy\nb sad\n")
    with pytest.raises(UserError, match="p.txt has no column answer"):
        read_answers(path)
    assert cli.main(["evaluate", "mer2023", "--config=tiny", "--predictions", str(path), "--out", str(tmp_path)]) == 2
    assert "has no column answer" in capsys.readouterr().err


@pytest.mark.smoke
def test_invalid_answers_are_counted_aloud(tmp_path, capsys):
    answers = write(tmp_path / "a.csv", "name,emotion,answer\na,happy,joyful\nb,sad,[happy; sad]\n")
    argv = ["evaluate", "labels", "--config=tiny", "--labels", "Happy,Sad", "--predictions", str(answers)]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert "accuracy 0.00 %, macro F1 0.00 %; 2 clips, 2 invalid answers\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labels", "message"),
    [("happy,", "'' has no word"), ("happy,happy", "give one or more, each once")],
)
def test_labels_on_the_command_line(tmp_path, capsys, labels, message):
    own = ["--list", f"train={write(tmp_path / 'l.csv', 'name,emotion')}", "--out", str(tmp_path / "out")]
    for argv in (["evaluate", "labels", "--config=tiny", "--out", str(tmp_path)], ["prepare", "clips", *own]):
        assert cli.main([*argv, "--labels", labels]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1


def test_data_sets_that_share_clips_must_agree(tmp_path):
    rng, splits = np.random.default_rng(0), []
    for i, emotion in enumerate((0, 0, 1)):
        record = random_record(7, rng, Recipe(labels=MERR), emotion=emotion)
        splits.append(Records(write_data(tmp_path / str(i), {"test": 1}, records=[record]), "test"))
    assert labels_of_records(splits[:2]) == {"clip 7": "happy"}
    with pytest.raises(UserError, match="'clip 7' is 'sad', and 'happy' in data before it"):
        labels_of_records(splits)
