"""`emollama evaluate`: the figures are those of the answers, whoever gave them, and stand beside the published ones."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from emollama_jax import cli
from emollama_jax.config import load_config
from emollama_jax.data.recipe import Recipe
from emollama_jax.data.records import Records
from emollama_jax.eval.benchmarks import BENCHMARKS, evaluate
from emollama_jax.eval.sweep import evaluate_records
from emollama_jax.infer.engine import Engine
from emollama_jax.infer.predictor import Predictor
from emollama_jax.text.labels import MER2023, MERR
from tests.data.prepared import random_record, write_data
from tests.train.runs import LLAMA

CLIPS = 10
TINY = ["--config=tiny", "--config.data.sequence_length=256", "--config.generate.max_new_tokens=4"]
# Of the released model on MER2023-SEMI, rows in this order of labels.
RELEASED = ("angry", "happy", "neutral", "sad", "surprise", "worried")
CONFUSION = (
    (179, 1, 2, 1, 0, 0),
    (2, 152, 7, 4, 3, 1),
    (10, 10, 134, 6, 2, 4),
    (2, 2, 1, 250, 0, 2),
    (1, 0, 3, 1, 6, 3),
    (4, 1, 3, 2, 1, 34),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base checkpoint, and the same clips, the last of them without a label, prepared by two frame rules."""
    folder = tmp_path_factory.mktemp("inputs")
    assert cli.main(["convert", str(LLAMA), str(folder / "base"), "--dtype", "float32"]) == 0
    rng, recipe = (
        np.random.default_rng(3),
        Recipe(labels=MERR, image_storage="image_tokens", image_tokens_shape=(17, 48)),
    )
    records = []
    for i in range(CLIPS):
        record = random_record(i, rng, recipe, emotion=MERR.index(MER2023[i % 6]) if i < CLIPS - 1 else -1)
        record["features"] = rng.normal(size=(3, 1024)).astype(np.float32)
        records.append(record)
    for frame in ("first", "peak"):
        path = write_data(folder / frame, {"test": CLIPS}, image="image_tokens", records=records, frame_rule=frame)
        path.rename(folder / f"{frame}-clips")
    return folder


@pytest.fixture(scope="module")
def engine(inputs):
    return Engine.load(config=load_config("tiny"), base=inputs / "base", inputs="image_tokens")


def run(*argv: object) -> int:
    return cli.main(["evaluate", *map(str, argv)])


def of_model(inputs: Path, out: Path, *argv: object, frames=("first",)) -> int:
    data = [text for frame in frames for text in ("--data", f"{inputs}/{frame}-clips:test")]
    return run("mer2023", *data, "--base", inputs / "base", *TINY, "--out", out, *argv)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_a_model_is_judged_by_its_likeliest_labels(inputs, engine, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert of_model(inputs, tmp_path / "out") == 0
    found = read(tmp_path / "out/evaluation.json")
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert [line["emotion"] for line in lines] == [*(MER2023[i % 6] for i in range(CLIPS - 1)), None]
    assert all(line["label"] == max(line["probabilities"], key=line["probabilities"].get) for line in lines)
    expected = evaluate(
        BENCHMARKS["mer2023"], [line["emotion"] for line in lines[:-1]], [line["label"] for line in lines[:-1]]
    )
    assert found["scores"] == expected.scores and found["clips"] == CLIPS - 1
    assert "Emotion-LLaMA, audio, video and text | 90.36" in (tmp_path / "out/evaluation.md").read_text()
    assert (tmp_path / "out/confusion.png").read_bytes()[:4] == b"\x89PNG"
    assert "9 clips, 1 without a label left out, 0 invalid answers" in capsys.readouterr().out

    evaluated = evaluate_records(engine, Records(inputs / "first-clips", "test"), BENCHMARKS["mer2023"], batch_size=4)
    assert [one.label for one in evaluated.predictions] == [line["label"] for line in lines]
    assert evaluated.unlabelled == 1


def test_a_sweep_over_modalities_and_frames(inputs, tmp_path, capsys):
    out = tmp_path / "out"
    assert of_model(inputs, out, "--modalities", "VAT,A", "--orders", 3, frames=("first", "peak")) == 0
    cells = [f"{frame}-{some}" for frame in ("first", "peak") for some in ("AVT", "A")]
    rows = read(out / "sweep.json")
    assert [f"{row['frame']}-{row['modalities']}" for row in rows] == cells
    for row, name in zip(rows, cells, strict=True):
        assert read(out / name / "evaluation.json")["scores"] == row["scores"]
        assert 0 <= row["order_sensitivity"]["spread"] <= 1 and 0 <= row["order_sensitivity"]["changed"] <= 1
    page = (out / "sweep.md").read_text()
    assert "| weighted F1 | accuracy | macro F1 | weighted F1 spread by label order |" in page
    assert "| **emollama_jax**, A, peak frame | " in page and "| HuBERT (audio) | 85.11 |" in page
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 7 and all("spread by label order" in line for line in told[:4])
    tokens = sum(row["tokens"] for row in rows) / CLIPS
    assert f"labels scored for 4 rows: {tokens:.1f} tokens a clip, " in told[5]
    heard = [(out / name / "predictions.jsonl").read_text() for name in cells]
    assert heard[0] != heard[1]  # the sound alone is judged otherwise
    assert heard[1] == heard[3]


def test_generated_answers_and_what_invalid_ones_count_as(inputs, tmp_path, monkeypatch, capsys):
    words = ["she is happy", "joyful", "SAD.", "happy", "angry", "I do not know"]
    monkeypatch.setattr(
        Predictor,
        "answers",
        lambda self, clips, soft, questions, history: [[words[int(clip.name.split()[1]) % 6]] for clip in clips],
    )
    for invalid, neutral in (("invalid", 0), ("neutral", 1)):
        assert of_model(inputs, tmp_path / invalid, "--by", "generate", "--invalid", invalid) == 0
        found = read(tmp_path / invalid / "evaluation.json")
        assert found["invalid"] == 3 and found["invalid_counted_as"] == invalid  # of clips 1, 5 and 7
        confusion = dict(zip(MER2023, found["confusion"], strict=True))
        assert confusion["happy"][0] == 2 and confusion["neutral"][MER2023.index("neutral")] == 0
        assert confusion["sad"][MER2023.index("neutral")] == 2 * neutral and confusion["sad"][-1] == 2 - 2 * neutral
    lines = (tmp_path / "invalid/predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines[:3]] == ["happy", None, "sad"]


def test_of_several_orders_the_label_said_most_often_counts(inputs, engine, monkeypatch):
    by_first = {"angry": "worried", "neutral": "happy", "surprise": "so happy"}  # of the question's labels

    def answers(self, clips, soft, questions, history):
        (asked,) = {question for (question,) in questions}
        return [[by_first[re.search(r"represents: (\w+)", asked)[1]]] for _ in clips]

    monkeypatch.setattr(Predictor, "answers", answers)
    records = Records(inputs / "first-clips", "test")
    found = evaluate_records(engine, records, BENCHMARKS["mer2023"], by="generate", orders=3)
    assert {(one.label, one.answer) for one in found.predictions} == {("happy", "happy")}
    assert found.evaluation.sensitivity["changed"] == 1 and found.evaluation.sensitivity["spread"] > 0


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """(answers, labels): files that give the released confusion matrix."""
    folder = tmp_path_factory.mktemp("released")
    answers, labels, number = ["name,prediction"], [], 0
    for true, row in zip(RELEASED, CONFUSION, strict=True):
        for predicted, count in zip(RELEASED, row, strict=True):
            for _ in range(count):
                answers.append(f"clip_{number:05d}.mp4,The person is {predicted.title()}.")
                labels.append(f"clip_{number:05d} {true}")
                number += 1
    (folder / "answers.csv").write_text("\n".join(answers))
    (folder / "labels.txt").write_text("\n".join(labels))
    return folder / "answers.csv", folder / "labels.txt"


@pytest.mark.smoke
def test_answers_of_another_system_give_the_published_figures(released, tmp_path, capsys):
    answers, labels = released
    assert run("mer2023", "--predictions", answers, "--list", labels, "--out", tmp_path / "out") == 0
    found = read(tmp_path / "out/evaluation.json")
    assert found["clips"] == 834
    assert found["scores"]["weighted_f1"] == pytest.approx(0.9035772132511264, abs=1e-12)
    assert found["scores"]["macro_f1"] == pytest.approx(0.8134121336588244, abs=1e-12)
    assert "weighted F1 90.36 %, accuracy 90.53 %, macro F1 81.34 %" in capsys.readouterr().out


def test_answers_and_clips_that_do_not_match_are_named(tmp_path, capsys):
    answers = tmp_path / "answers.jsonl"
    records = [
        {"name": "1.mp4", "answer": "happy", "emotion": "happiness"},
        {"name": "00002", "status": "error", "stage": "read", "error": "damaged"},
        {"name": "9", "answer": "calm"},
    ]
    answers.write_text("".join(json.dumps(record) + "\n" for record in records))
    labels = tmp_path / "labels.csv"
    labels.write_text("name,label\n1,happy\n2,calm\n3,calm\n")
    argv = ["labels", "--labels", "happy,calm", "--predictions", answers, "--out", tmp_path / "out"]
    assert run(*argv, "--list", labels) == 0
    told = capsys.readouterr().out
    assert "2 clips without an answer, counted as invalid: 2, 3" in told
    assert "1 answers about other clips, left out: 9" in told
    assert read(tmp_path / "out/evaluation.json")["confusion"] == [[1, 0, 0], [0, 0, 2]]
    assert run(*argv) == 0  # by the label beside the one answer that has one
    assert read(tmp_path / "out/evaluation.json")["clips"] == 1


def test_what_predict_wrote_is_judged_as_the_model_is(inputs, tmp_path):
    assert of_model(inputs, tmp_path / "model") == 0
    data = f"{inputs}/first-clips:test"
    argv = [data, "--out", tmp_path / "answers.jsonl", "--base", inputs / "base", *TINY]
    assert cli.main(["predict", *map(str, argv), "--config.prompt.labels=" + ",".join(MER2023)]) == 0
    argv = ["--predictions", tmp_path / "answers.jsonl", "--data", data, "--out", tmp_path / "file"]
    assert run("mer2023", *argv) == 0
    ours, theirs = (read(tmp_path / name / "evaluation.json") for name in ("model", "file"))
    assert ours == theirs


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["emer"], "emer is a verb of its own: emollama judge ANSWERS REFERENCES"),
        (["dfew", "--list", "labels.txt"], "--list: goes with --predictions"),
        (["dfew", "--predictions", "a.csv", "--trained", "run"], "--trained: answers in a file"),
        (["dfew", "--labels", "a,b"], "--labels: dfew has its own"),
        (["labels", "--labels", "a,a"], "labels=\\('a', 'a'\\): give one or more, each once"),
        (["mer2023", "--modalities", "AV,VA"], "give each set once"),
        (["mer2023", "--modalities", "AV,X"], "modalities 'X'"),
        (["mer2023", "--data", "{data}"], "data of the frame rules first, first"),
        (["dfew"], "clips with the label 'worried'"),
    ],
)
def test_what_cannot_be_is_one_line(inputs, tmp_path, argv, message, capsys):
    data = f"{inputs}/first-clips:test"
    argv = [text.format(data=data) for text in argv]
    code = run(*argv, "--data", data, "--base", inputs / "base", "--out", tmp_path / "out", *TINY)
    error = capsys.readouterr().err
    assert code == 2 and len(error.strip().splitlines()) == 1
    assert re.search(message, error), error
