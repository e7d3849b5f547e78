"""`emollama judge`: free-form answers are compared with descriptions, by words and by a language model."""

import json

from emollama_jax import cli
from tests.eval.judge_server import said, serve


def run(*argv: object) -> int:
    return cli.main(["judge", *map(str, argv)])


def test_emer_by_words_and_by_a_judge(tmp_path, monkeypatch, capsys):
    references = tmp_path / "references.csv"
    references.write_text("names,eng_reasons\na,A broad smile and a lively voice\nb,Tears\nc,A frown\n")
    labels = tmp_path / "labels.txt"
    labels.write_text("a happy\nb sad\n")
    answers = tmp_path / "answers.csv"
    answers.write_text('name,answer\na,"a broad smile, so she is happy"\nb,she laughs\n')
    argv = [answers, references, "--list", labels, "--out", tmp_path / "out"]
    assert run(*argv) == 0
    report = json.loads((tmp_path / "out/emer.json").read_text())
    assert (report["clips"], report["missing"], report["label_hit_rate"]) == (2, 1, 0.5)
    assert 0 < report["clue_word_overlap"] < 1 and "overlap" not in report
    with serve(lambda question, n: said("joy" if question.startswith("Which emotions") else "7")) as server:
        monkeypatch.setenv("EMOLLAMA_JUDGE_ADDRESS", server.address)
        monkeypatch.setenv("EMOLLAMA_JUDGE_MODEL", "m")
        assert run(*argv, "--judge") == 0
    report = json.loads((tmp_path / "out/emer.json").read_text())
    assert {kind: found["mean"] for kind, found in report["overlap"].items()} == {"clue": 7, "label": 7}
    assert report["judge"] == "m" and report["overlap"]["clue"]["statuses"] == {"scored": 2}
    page = (tmp_path / "out/emer.md").read_text()
    assert "| Emotion-LLaMA | 7.83 | 6.25 |" in page and page in capsys.readouterr().out


def test_no_model_to_ask_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("EMOLLAMA_JUDGE_ADDRESS", raising=False)
    (tmp_path / "references.csv").write_text("names,eng_reasons\na,Tears\n")
    assert run(tmp_path / "a.csv", tmp_path / "references.csv", "--judge", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "set EMOLLAMA_JUDGE_ADDRESS" in error and len(error.splitlines()) == 1


def test_the_forms_of_emer_and_a_judge_that_scores_nothing(tmp_path, monkeypatch, capsys):
    """EMER's first table as references, the original's output as answers; thinking is not judged."""
    references = tmp_path / "gt.csv"
    references.write_text('names,emotions,subtitles,reasons\ns1,angry,Go away.,"He roared, so he is angry."\n')
    answers = tmp_path / "answers.csv"
    answers.write_text("names,chi_reasons\ns1,<think>Smiles?</think>He roared and he is angry.\n")
    with serve(lambda question, n: said("The 2 overlap: 9")) as server:
        monkeypatch.setenv("EMOLLAMA_JUDGE_ADDRESS", server.address)
        monkeypatch.setenv("EMOLLAMA_JUDGE_MODEL", "m")
        assert run(answers, references, "--judge", "--out", tmp_path / "out") == 1
        assert not any("Smiles" in question or "Go away" in question for question in server.asked)
    printed = capsys.readouterr()
    assert "the judge scored no clip (clue, label overlap)" in printed.err
    assert "Clue Overlap, by m: unparsable 1." in printed.out
