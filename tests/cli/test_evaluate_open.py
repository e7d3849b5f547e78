"""`emollama evaluate` for labels of an open vocabulary: files in, tables beside the published rows out."""

import json

import numpy as np
import pytest

from emollama_jax import cli
from emollama_jax.eval.label_files import write_label_sets
from emollama_jax.eval.unibench import UNIBENCH
from tests.eval.wheel_tables import write_tables


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("wheels") / "tables")


def run(*argv: object) -> int:
    return cli.main(["evaluate", *map(str, argv)])


def test_one_set_with_its_floor_and_the_published_rows(wheels, tmp_path, capsys):
    truth = tmp_path / "truth.csv"
    truth.write_text("name,openset\na,\"['glad', 'down']\"\nb,fury\nc,neutral\nd,\n")
    write_label_sets(tmp_path / "r-openset.npz", {"a": ["joyful"], "b": ["angry"], "x": ["sad"]})
    argv = ["ov-merd", "--predictions", tmp_path / "r-openset.npz", "--list", truth, "--wheels", wheels]
    assert run(*argv, "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    # P = 1 and R = (1/2 + 1) / 2 in each wheel; the words of the second wheel's level 1 are as many.
    assert found["scores"]["s1"] == pytest.approx(2 * 0.75 / 1.75)
    assert (found["clips"], found["scored"], found["unanswered"]) == (3, 2, ["c"])
    low, high = found["intervals"]["s1"]
    assert low <= found["scores"]["s1"] <= high
    assert set(found["floors"]) == {"most frequent label", "all labels"}
    page, told = (tmp_path / "out/evaluation.md").read_text(), capsys.readouterr().out
    assert "| Emotion-LLaMA, released, AVT | 54.44 |" in page and "OV-MERD+ has 532 clips, these are 3" in page
    assert (
        "OV-MERD+ has 532 clips, these are 3" in told and "floor of constant answers, S1: most frequent label" in told
    )
    assert "1 answers about other clips, left out: x" in told


def test_the_nine_sets_and_their_mean(wheels, tmp_path, capsys):
    said, true = tmp_path / "said", tmp_path / "true"
    said.mkdir()
    true.mkdir()
    for one in UNIBENCH:
        if one.kind == "sentiment":
            (true / f"{one.name}.csv").write_text("name,valence\na,1.5\nb,-2\nc,0\n")
        else:
            (true / f"{one.name}.csv").write_text("name,openset\na,glad\nb,fury\n")
        if one.name != "simsv2":
            write_label_sets(said / f"{one.name}-openset.npz", {"a": ["joyful"], "b": ["angry", "glad"]})
    argv = ["unibench", "--predictions", said, "--list", true, "--wheels", wheels, "--out", tmp_path / "out"]
    assert run(*argv) == 0
    assert "no mean of the nine sets: simsv2 missing" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/unibench.json").read_text())["mean"] is None
    (said / "simsv2.csv").write_text('name,openset\na,positive\nb,"negative, negative"\n')
    assert run(*argv) == 0
    found = json.loads((tmp_path / "out/unibench.json").read_text())
    first = {one.name: found["sets"][one.name]["scores"][one.first_metric] for one in UNIBENCH}
    assert found["mean"] == pytest.approx(np.mean(list(first.values()))) and first["simsv2"] == 1
    assert first["mer2023"] == 1 and found["sets"]["mer2023"]["scores"]["m_score"] == pytest.approx(0.75)
    assert found["sets"]["mer2023"]["floors"]["all labels"]["hit_rate"] == 1  # the hit rate can be had without looking
    page = (tmp_path / "out/unibench.md").read_text()
    assert "| Emotion-LLaMA | 64.17 |" in page and "| MER2023 | hit rate | 100.00 |" in page
    assert "| CMU-MOSI | weighted F1 |" in page and "MER2023 has 411 clips, these are 2" in page
    assert (tmp_path / "out/ov-merd/evaluation.md").exists()


def test_mer2024_ov(tmp_path, capsys):
    (tmp_path / "truth.csv").write_text('name,openset\na,"happy, sad"\nb,angry\n')
    (tmp_path / "said.csv").write_text('name,openset\na,"glad, x"\n')
    (tmp_path / "synonyms").mkdir()
    for name, groups in (("a", "[['happy', 'glad']]"), ("b", "[]")):
        np.save(tmp_path / f"synonyms/{name}.npy", groups)
    argv = ["mer2024-ov", "--predictions", tmp_path / "said.csv", "--list", tmp_path / "truth.csv"]
    assert run(*argv, "--synonyms", tmp_path / "synonyms", "--out", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/evaluation.json").read_text())["scores"]["average"] == 0.25
    assert "1 clips without an answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ov-merd"], "give the labels with --predictions"),
        (["ov-merd", "--predictions", "x.npz", "--list", "y.csv"], "--wheels: give the folder"),
        (["mer2024-ov", "--predictions", "x.npz", "--list", "y.csv"], "--synonyms"),
        (["unibench", "--predictions", "x", "--list", "y", "--wheels", "WHEELS"], "is no folder"),
    ],
)
def test_what_is_missing_is_one_line(argv, message, wheels, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*(wheels if word == "WHEELS" else word for word in argv), "--out", "out") == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_several_labels_of_a_clip_and_mer2023s_combined_ranking(tmp_path, capsys):
    (tmp_path / "truth.csv").write_text('name,discrete,valence\na,"surprise, happy",2\nb,sad,-1\nc,"angry, sad",0\n')
    (tmp_path / "said.csv").write_text("name,discrete,valence\na,happy,1\nb,happy,-1\nc,happy,0\n")
    argv = ["mer2023", "--predictions", tmp_path / "said.csv", "--list", tmp_path / "truth.csv"]
    assert run(*argv, "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert [line["emotion"] for line in lines] == ["happy", "sad", "angry"]  # right by any, else the first
    assert found["valence"]["mse"] == pytest.approx(1 / 3)
    assert found["valence"]["combined"] == pytest.approx(found["scores"]["weighted_f1"] - 0.25 / 3)
    assert "MER2023's combined ranking" in capsys.readouterr().out
    assert "by which MER2023 ranks" in (tmp_path / "out/evaluation.md").read_text()
