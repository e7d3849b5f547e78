import json

import numpy as np
import pytest

from emollama_jax.errors import UserError
from emollama_jax.eval import report
from emollama_jax.eval.benchmarks import BENCHMARKS, Benchmark, benchmark_of, evaluate
from emollama_jax.text.fonts import find_fonts
from emollama_jax.text.labels import DFEW

TRUTH = [*["happy"] * 4, *["sad"] * 3, "fear"]
PREDICTIONS = ["happy", "happy", "happy", None, "sad", "sad", "fear", "fear"]


@pytest.fixture(scope="module")
def evaluation():
    by_order = [PREDICTIONS, [*PREDICTIONS[:3], "happy", *PREDICTIONS[4:]]]
    return evaluate(benchmark_of("dfew"), TRUTH, PREDICTIONS, by_order=by_order, seed=3)


def rows(markdown):
    """The cells of every line of a table."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]


@pytest.mark.smoke
def test_an_evaluation(evaluation):
    assert (evaluation.clips, evaluation.invalid, evaluation.counted_as) == (8, 1, "invalid")
    assert evaluation.scores["war"] == 6 / 8
    assert evaluation.scores["uar"] == pytest.approx((3 / 4 + 2 / 3 + 1) / 3)
    assert evaluation.sensitivity["changed"] == 1 / 8
    assert evaluation.sensitivity["spread"] == pytest.approx(1 / 12)  # of UAR, by which DFEW is judged
    assert all(low <= evaluation.scores[name] <= high for name, (low, high) in evaluation.intervals.items())


def test_a_data_set_of_ones_own():
    ours = Benchmark(name="ours", labels=("calm", "neutral"))
    evaluation = evaluate(ours, ["calm", "neutral", "calm"], ["calm", "happy", "what"], invalid="neutral")
    assert evaluation.confusion.tolist() == [[1, 1, 0], [0, 1, 0]]
    assert (evaluation.invalid, evaluation.counted_as) == (2, "neutral")
    page = report.to_markdown(evaluation)
    assert page.startswith("# ours\n\n3 clips, 2 invalid answers, counted as neutral.\n")
    assert ["**emollama_jax**", "66.67", "66.67", "66.67"] in rows(page)
    assert "orders" not in page


def test_every_benchmark_is_well_formed():
    for benchmark in BENCHMARKS.values():
        assert 0.99 > max((max(row.scores.values()) for row in benchmark.published), default=0) >= 0
        assert {name for row in benchmark.published for name in row.scores} <= set(benchmark.metrics)
        assert evaluate(benchmark, benchmark.labels, benchmark.labels).scores["macro_f1"] == 1
    assert set(BENCHMARKS) == {"mer2023", "mer2024", "dfew"}


def test_names_and_definitions_that_are_wrong():
    with pytest.raises(UserError, match="dfeww: no such benchmark; did you mean dfew"):
        benchmark_of("dfeww")
    with pytest.raises(ValueError, match="each once"):
        Benchmark(name="ours", labels=("a", "a"))
    with pytest.raises(ValueError, match="no metric 'f1'"):
        Benchmark(name="ours", labels=("a", "b"), metrics=("f1",))


def test_the_json_says_all(evaluation, tmp_path):
    report.save(evaluation, tmp_path / "made/here")
    data = json.loads((tmp_path / "made/here/evaluation.json").read_text())
    assert data["benchmark"] == "dfew" and data["labels"] == list(DFEW)
    assert data["scores"] == evaluation.scores
    assert np.sum(data["confusion"]) == 8 and data["confusion"][0] == [3, 0, 0, 0, 0, 0, 0, 1]
    assert data["confusion_columns"][-1] == "invalid"
    assert data["per_class"]["sad"] == {"precision": 1.0, "recall": 2 / 3, "f1": 0.8, "support": 3.0}
    assert {"who": "MAE-DFER", "scores": {"uar": 0.6341, "war": 0.7443}} in data["published"]
    assert data["order_sensitivity"] == evaluation.sensitivity
    assert data["intervals"]["uar"] == list(evaluation.intervals["uar"])


def test_the_page_has_the_published_rows_beside_ours(evaluation):
    page = report.to_markdown(evaluation)
    cells = rows(page)
    assert cells[0] == ["", "UAR", "WAR"]
    assert cells[2] == ["**emollama_jax**", "80.56", "75.00"]
    assert ["Emotion-LLaMA, fine-tuned", "64.21", "77.06"] in cells
    assert ["sad", "100.00", "66.67", "80.00", "3"] in cells
    assert ["happy", "3", "0", "0", "0", "0", "0", "0", "1"] in cells
    assert "UAR spreads over 8.33 points; 12.50 % of the" in page


def test_the_picture(evaluation, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    pictures = []
    other = evaluate(benchmark_of("dfew"), TRUTH, PREDICTIONS[::-1])
    for i, drawn in enumerate((evaluation, evaluation, other)):
        report.save(drawn, tmp_path / str(i))
        with Image.open(tmp_path / str(i) / "confusion.png") as image:
            assert image.format == "PNG" and min(image.size) > 500
            pictures.append(np.asarray(image.convert("RGB")))
    assert np.array_equal(pictures[0], pictures[1])
    assert pictures[2].shape != pictures[0].shape or (pictures[2] != pictures[0]).any()


def test_a_folder_that_cannot_be_written(evaluation, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the output .*choose another place"):
        report.save(evaluation, tmp_path / "file" / "below")


def test_labels_in_other_scripts_are_drawn_or_numbered(monkeypatch, tmp_path, caplog):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self.axes[0]))
    own = Benchmark(name="own", labels=("开心", "tense"))
    evaluation = evaluate(own, ["开心", "tense"], ["开心", None])
    assert find_fonts("ärgerlich, тревога") == ["DejaVu Sans"]
    for fonts, written in ((None, ["label 1", "label 2"]), (["DejaVu Sans", "Noto Sans CJK SC"], ["开心", "tense"])):
        monkeypatch.setattr(report, "find_fonts", lambda text, fonts=fonts: fonts)
        report.plot_confusion(evaluation, tmp_path / "confusion.png")
        assert [label.get_text() for label in drawn[-1].get_yticklabels()] == written
    assert "they are numbered in the picture" in caplog.text
