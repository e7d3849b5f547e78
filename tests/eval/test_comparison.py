"""Several runs and two systems: deviations by hand, tests against the textbook's numbers and plain resampling."""

import json
from dataclasses import replace
from math import comb

import numpy as np
import pytest

from emollama_jax.config import load_config, to_dict
from emollama_jax.data.records import Records
from emollama_jax.errors import UserError
from emollama_jax.eval.benchmarks import Benchmark, evaluate
from emollama_jax.eval.comparison import compare, match_predictions, mcnemar, spread
from emollama_jax.eval.conflicts import evaluate_subsets, find_conflicts, to_markdown
from emollama_jax.eval.metrics import confusion_matrix, scores
from emollama_jax.eval.runs_report import EvaluatedRun, save_runs
from emollama_jax.eval.selection import check_unseen, find_selection
from emollama_jax.eval.sweep import Cell, Evaluated, Prediction
from emollama_jax.runs.run import Run
from tests.data.prepared import write_data
from tests.train.runs import seal, write_meta

LABELS = ("a", "b", "c")
BENCHMARK = Benchmark(name="ours", labels=LABELS)
TRUTH = ["a", "a", "b", "b", "c", "c"]


def evaluated(labels, truth=TRUTH):
    predictions = tuple(
        Prediction(f"clip {i}", t, p or "", p) for i, (t, p) in enumerate(zip(truth, labels, strict=True))
    )
    kept = [(t, p) for t, p in zip(truth, labels, strict=True) if t is not None]
    return Evaluated(evaluate(BENCHMARK, *map(list, zip(*kept, strict=True)), resamples=50), predictions)


def test_mean_and_deviation_of_three_runs():
    found = spread([evaluated(run).evaluation for run in (TRUTH, ["a"] * 6, [*"aabb", None, None])])["accuracy"]
    assert found.values == pytest.approx((1, 1 / 3, 2 / 3)) and found.mean == pytest.approx(2 / 3)
    assert found.deviation == pytest.approx(1 / 3)
    assert np.isnan(spread([evaluated(TRUTH).evaluation])["accuracy"].deviation)


@pytest.mark.smoke
def test_mcnemar_by_hand():
    """6 clips that the first alone gets right, 1 that the second does: p = 2 (C(7,0) + C(7,1)) / 2**7."""
    truth = ["a"] * 20
    first = ["a"] * 16 + ["b"] * 4
    second = ["a"] * 10 + ["b"] * 9 + ["a"]
    found = mcnemar(truth, first, second)
    assert (found.only_first, found.only_second) == (6, 1)
    assert found.p == pytest.approx(2 * (comb(7, 0) + comb(7, 1)) / 2**7)
    assert mcnemar(truth, first, first).p == 1


def test_the_paired_bootstrap_is_that_of_drawing_clips():
    rng = np.random.default_rng(0)
    truth = [LABELS[i] for i in rng.integers(3, size=40)]
    runs = [[t if rng.random() < right else LABELS[rng.integers(3)] for t in truth] for right in (0.9, 0.8, 0.3, 0.3)]
    runs[0][0] = None
    found = compare(truth, runs[:2], runs[2:], LABELS, "macro_f1", resamples=400)
    value = lambda run, some: scores(confusion_matrix([truth[i] for i in some], [run[i] for i in some], LABELS))[
        "macro_f1"
    ]
    plain = lambda some: (
        np.mean([value(run, some) for run in runs[:2]]) - np.mean([value(run, some) for run in runs[2:]])
    )
    assert found.difference == pytest.approx(plain(range(40)))
    drawn = [plain(rng.integers(40, size=40)) for _ in range(400)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found.interval == pytest.approx((low, high), abs=0.05) and found.p < 0.01
    assert compare(truth, runs[:1], runs[:1], LABELS, "uar").p == 1  # a system is as good as itself
    assert compare(truth, runs[2:3], runs[:1], LABELS, "uar").difference < 0


def test_runs_of_other_clips_are_not_compared():
    one, other = evaluated(TRUTH).predictions, evaluated(TRUTH[::-1], TRUTH[::-1]).predictions
    assert match_predictions([one, one]) == (TRUTH, [TRUTH, TRUTH])
    with pytest.raises(UserError, match="not evaluated on the same clips"):
        match_predictions([one, other])
    unlabelled = evaluated(TRUTH, [*TRUTH[:5], None]).predictions
    assert match_predictions([unlabelled]) == (TRUTH[:5], [TRUTH[:5]])


def test_the_page_of_runs(tmp_path):
    runs = [
        EvaluatedRun(name, "step 4, the last that is there", (Cell("d:test", "first", "AVT", evaluated(labels)),))
        for name, labels in (("runs/1", TRUTH), ("runs/2", ["a", "a", "b", "b", "c", "a"]), ("runs/3", ["a"] * 6))
    ]
    page = save_runs(runs[:2], runs[2:], tmp_path)
    assert page == (tmp_path / "runs.md").read_text()
    assert "- runs/2: step 4, the last that is there" in page
    assert "| **emollama_jax**, AVT, first frame |" in page and "91.67 ± 11.79" in page
    assert "AVT, first frame, runs/1 and runs/3 | 4 | 0 | 0.125 |" in page
    found = json.loads((tmp_path / "runs.json").read_text())
    assert found["checkpoints"]["runs/3"].startswith("step 4")
    assert found["cells"][0]["differences"]["accuracy"]["difference"] == pytest.approx(11 / 12 - 1 / 3)
    assert "±" not in save_runs(runs[:1], (), tmp_path)


def test_clips_in_conflict_are_scored_apart():
    by_view = {
        "AVT": evaluated(TRUTH),
        "A": evaluated(["a", "b", "b", "b", "c", "c"]),
        "V": evaluated(["a", "a", "b", "b", "c", "a"]),
        "T": evaluated(["a", "a", "b", "b", "c", "c"]),
    }
    names = find_conflicts(by_view)
    assert names == {"clip 1", "clip 5"}
    found = evaluate_subsets(by_view, names)
    assert found["conflict"]["AVT"].clips == 2 and found["agreement"]["AVT"].clips == 4
    assert found["conflict"]["A"].scores["accuracy"] == 0.5 and found["agreement"]["A"].scores["accuracy"] == 1
    page = to_markdown(found, "by a list")
    assert "| conflict, A | 2 | " in page and page.startswith("# Clips in conflict, by a list\n")
    assert set(evaluate_subsets(by_view, ["none"])) == {"agreement"}
    del by_view["T"]
    with pytest.raises(UserError, match="evaluate T, too, or give a list"):
        find_conflicts(by_view)


@pytest.fixture
def data(tmp_path):
    path = write_data(tmp_path / "data", {"train": 2, "held": 2, "test": 2}, image="image_tokens")
    seal(path, "synthetic")
    return path


def run_of(folder, data, *, validation=(), patience=0, best=None, train=None):
    config = load_config("tiny")
    settings = replace(config.train, validation=validation, patience=patience)
    config = replace(config, train=settings, data=replace(config.data, train=train or (f"{data}:train",)))
    best = {"best": {"step": best, "value": 0.0, "worse": 0}} if best is not None else {}
    write_meta(folder / "checkpoints/4", config=to_dict(config), data=[["train", 2, "synthetic"]], **best)
    return folder


def test_how_a_checkpoint_was_chosen_and_what_it_may_be_evaluated_on(tmp_path, data):
    splits = {name: Records(data, name) for name in ("train", "held", "test")}
    held = (f"{data}:held",)
    last = Run.open(run_of(tmp_path / "a", data, validation=held, best=4))
    selection = find_selection(last)
    assert selection.text == f"step 4, the last that is there; validated on {data}:held" and not selection.chosen_on
    check_unseen(last, selection, [splits["test"], splits["held"]])
    with pytest.raises(UserError, match="was trained on .*:train; evaluate on other clips"):
        check_unseen(last, selection, [splits["train"]])

    best = Run.open(tmp_path / "a/checkpoints/4")  # named, and the best: its validation chose it
    selection = find_selection(best)
    assert selection.text == f"step 4, the best by loss on {data}:held"
    check_unseen(best, selection, [splits["test"]])
    with pytest.raises(UserError, match="its checkpoint was chosen on .*:held"):
        check_unseen(best, selection, [splits["held"]])
    stopped = Run.open(run_of(tmp_path / "b", data, validation=held, patience=3, best=1))
    with pytest.raises(UserError, match="no longer rose"):
        check_unseen(stopped, find_selection(stopped), [splits["held"]])
    elsewhere = Run.open(run_of(tmp_path / "c", data, train=("moved:train",)))  # told by the data's fingerprint
    with pytest.raises(UserError, match="was trained on"):
        check_unseen(elsewhere, find_selection(elsewhere), [splits["train"]])
    assert find_selection(elsewhere).text.endswith("no validation")
