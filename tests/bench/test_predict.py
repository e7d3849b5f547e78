"""The measurement of prediction: what is measured is what a clip is asked, and both answer the same."""

import json

import pytest

from emollama_jax import cli
from emollama_jax.bench import report as bench_report
from emollama_jax.bench.mixed_answers import LOCKSTEP
from emollama_jax.bench.peer import PEER
from emollama_jax.bench.predict import Pieces
from emollama_jax.bench.report import OURS
from emollama_jax.config import load_config
from emollama_jax.data.batch import soft_tokens_per_clip

TINY = load_config("tiny")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(bench_report, "SETTLE_S", 0)


@pytest.mark.slow
def test_both_give_the_same_reasons(tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    file = tmp_path / "predict.json"
    argv = [
        "predict",
        "--config=tiny",
        "--batch",
        "2",
        "--new-tokens",
        "9",
        "--repeats",
        "1",
        "--longest=12",
        "--json",
        str(file),
    ]
    assert cli.main(["bench", *argv]) == 0
    data = json.loads(file.read_text())
    rows = [(result["what"], result["who"], result["batch"]) for result in data["results"]]
    clips = [(what, who, 2) for what in ("labels", "reasons") for who in (OURS, PEER)]
    assert rows == clips + [("answers", who, 8) for who in (OURS, LOCKSTEP, PEER)]
    for result in data["results"][:4]:
        (figures,) = result["runs"]
        assert figures["clips"] == (result["batch"] if result["who"] == OURS else 1)
        assert figures["clips_per_s"] == pytest.approx(figures["clips"] / figures["seconds"])
    assert "batch 2: 100.0% of the first clip's tokens are the same from both" in data["notes"]
    for result in data["results"][4:]:
        (figures,) = result["runs"]
        assert figures["tokens"] == data["results"][4]["best"]["tokens"] > 24 * 5
        assert figures["tokens_per_s"] == pytest.approx(figures["tokens"] / figures["seconds"])
    for who in (LOCKSTEP, PEER):
        assert any(note.endswith(f"x {who}, 100.0% of the tokens are the same from both") for note in data["notes"])
    table = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("x") for line in table) == 3
    assert 60 < data["settings"]["prompt_tokens"] - soft_tokens_per_clip(TINY) < 120


def test_pieces_are_ids_of_the_vocabulary():
    pieces = Pieces(97)
    ids = pieces.encode("Please determine which emotion label")
    assert len(ids) == len(" Plea se dete rmin e whic h emot ion labe l".split()) and pieces.encode(
        "happy"
    ) == pieces.encode("happy")
    assert 2 <= min(ids) and max(ids) < 96 and pieces.encode("happy") != pieces.encode("angry")
