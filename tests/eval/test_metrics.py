"""Metrics against published figures, scikit-learn, and tables small enough to do by hand."""

from fractions import Fraction

import numpy as np
import pytest

from emollama_jax.errors import UserError
from emollama_jax.eval.metrics import bootstrap, confusion_matrix, order_sensitivity, per_class, scores
from emollama_jax.text.labels import METRICS

# What the reference released for MER2023-SEMI.
ALPHABETICAL = ("angry", "happy", "neutral", "sad", "surprise", "worried")
RELEASED = [
    [179, 1, 2, 1, 0, 0],
    [2, 152, 7, 4, 3, 1],
    [10, 10, 134, 6, 2, 4],
    [2, 2, 1, 250, 0, 2],
    [1, 0, 3, 1, 6, 3],
    [4, 1, 3, 2, 1, 34],
]


def clips_of(matrix, labels):
    """(truth, predictions) with these counts, in an order of no meaning."""
    cells = [
        (t, p)
        for t, row in zip(labels, matrix, strict=True)
        for p, n in zip(labels, row, strict=True)
        for _ in range(n)
    ]
    np.random.default_rng(0).shuffle(cells)
    return [t for t, _ in cells], [p for _, p in cells]


@pytest.mark.parametrize("labels", [ALPHABETICAL, ALPHABETICAL[::-1]])
def test_the_released_confusion_matrix(labels):
    truth, predictions = clips_of(RELEASED, ALPHABETICAL)
    assert len(truth) == 834
    confusion = confusion_matrix(truth, predictions, labels)
    found = scores(confusion)
    if labels == ALPHABETICAL:
        assert confusion[:, :-1].tolist() == RELEASED
        assert found["accuracy"] == 0.9052757793764988
        assert found["weighted_precision"] == 0.9036254851540454
        assert found["weighted_f1"] == 0.9035772132511264
    f1 = [Fraction(2 * row[i], sum(row) + sum(r[i] for r in RELEASED)) for i, row in enumerate(RELEASED)]
    exact = float(sum(f1) / 6)  # the published figure is one unit in the last place below
    assert found["macro_f1"] == pytest.approx(exact, abs=1.2e-16)
    assert exact - 0.8134121336588244 == pytest.approx(1.1e-16, abs=1e-17)


def test_a_table_done_by_hand():
    """a: 3 of 4 right, one invalid. b: 1 of 2, the other called a. c never occurs but is predicted once, for d. e is
    in neither."""
    truth = ["a", "a", "a", "a", "b", "b", "d"]
    predictions = ["a", "a", "a", "nonsense", "b", "a", "c"]
    confusion = confusion_matrix(truth, predictions, "abcde")
    assert confusion.tolist() == [
        [3, 0, 0, 0, 0, 1],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    classes = per_class(confusion)
    assert classes["precision"].tolist() == [0.75, 1, 0, 0, 0]
    assert classes["recall"].tolist() == [0.75, 0.5, 0, 0, 0]
    assert classes["f1"].tolist() == [0.75, 2 / 3, 0, 0, 0]
    assert classes["support"].tolist() == [4, 2, 0, 1, 0]
    found = {name: float(value) for name, value in scores(confusion).items()}
    assert found == pytest.approx(
        {
            "accuracy": 4 / 7,
            "war": 4 / 7,
            "uar": (0.75 + 0.5 + 0) / 3,  # the classes in the truth: a, b, d
            "macro_recall": (0.75 + 0.5 + 0 + 0) / 4,  # and c, which was predicted
            "macro_precision": (0.75 + 1) / 4,
            "macro_f1": (0.75 + 2 / 3) / 4,
            "weighted_precision": (4 * 0.75 + 2 * 1) / 7,
            "weighted_recall": 4 / 7,
            "weighted_f1": (4 * 0.75 + 2 * 2 / 3) / 7,
        }
    )
    assert tuple(found) == METRICS


def test_invalid_answers_as_neutral():
    truth, predictions = ["sad", "neutral", "sad"], ["sad", "joyful", None]
    labels = ("sad", "neutral")
    assert confusion_matrix(truth, predictions, labels).tolist() == [[1, 0, 1], [0, 0, 1]]
    old = confusion_matrix(truth, predictions, labels, invalid="neutral")
    assert old.tolist() == [[1, 1, 0], [0, 1, 0]]
    assert scores(old)["accuracy"] == 2 / 3


def random_case(seed):
    """(truth, predictions, labels): classes may be absent from either, and answers invalid."""
    rng = np.random.default_rng(seed)
    labels = [f"label {i}" for i in range(rng.integers(1, 10))]
    count = rng.integers(1, 60)
    truth = rng.choice(labels[: rng.integers(1, len(labels) + 1)], count).tolist()
    answers = [*labels[rng.integers(len(labels)) :], "invalid", "nonsense"]
    guesses = rng.choice(answers, count).tolist()
    right = rng.random(count) < rng.random()
    return truth, [t if r else g for t, g, r in zip(truth, guesses, right, strict=True)], labels


def test_as_scikit_learn():
    sklearn = pytest.importorskip("sklearn")
    from sklearn.metrics import precision_recall_fscore_support

    absent = invalid = 0
    for seed in range(300):
        truth, predictions, labels = random_case(seed)
        confusion = confusion_matrix(truth, predictions, labels)
        found, classes = scores(confusion), per_class(confusion)
        code = {label: i for i, label in enumerate(labels)}  # numbers are quicker there
        y_true, y_pred = np.array([code[t] for t in truth]), np.array([code.get(p, -1) for p in predictions])
        occurring = sorted({*y_true.tolist(), *y_pred.tolist()} - {-1})
        with sklearn.config_context(skip_parameter_validation=True, assume_finite=True):
            for average, over in (("weighted", occurring), ("macro", occurring), (None, list(code.values()))):
                theirs = precision_recall_fscore_support(y_true, y_pred, labels=over, average=average, zero_division=0)
                names = ("precision", "recall", "f1")
                ours = [found[f"{average}_{name}"] if average else classes[name] for name in names]
                np.testing.assert_allclose(ours, theirs[:3], rtol=1e-12, atol=1e-15)
        np.testing.assert_array_equal(classes["support"], theirs[3])
        assert found["uar"] == pytest.approx(theirs[1][np.unique(y_true)].mean(), rel=1e-12)
        assert found["accuracy"] == pytest.approx(np.mean(y_true == y_pred), rel=1e-12)
        absent += len(occurring) < len(labels)
        invalid += bool(confusion[:, -1].any())
    assert absent > 60 and invalid > 60


def test_intervals_hold_the_spread_of_resampled_clips():
    """Against clips drawn one by one, by a loop."""
    truth, predictions = clips_of([[30, 5, 1], [4, 12, 2], [0, 3, 5]], "abc")
    confusion = confusion_matrix(truth, predictions, "abc")
    intervals = bootstrap(confusion, resamples=4000)
    rng, drawn = np.random.default_rng(1), []
    for _ in range(1500):
        clips = rng.integers(0, len(truth), len(truth))
        again = confusion_matrix([truth[i] for i in clips], [predictions[i] for i in clips], "abc")
        drawn.append(scores(again))
    for name in METRICS:
        expected = np.quantile([float(resample[name]) for resample in drawn], [0.025, 0.975])
        np.testing.assert_allclose(intervals[name], expected, atol=0.02)
        assert intervals[name][0] < scores(confusion)[name] < intervals[name][1]


@pytest.mark.smoke
def test_intervals_are_seeded_and_narrow_with_more_clips():
    confusion = np.array([[30, 5, 0], [4, 12, 1]])
    assert bootstrap(confusion) == bootstrap(confusion) != bootstrap(confusion, seed=1)
    width = lambda matrix, **settings: np.subtract(*bootstrap(matrix, **settings)["accuracy"][::-1])
    assert width(100 * confusion) < 0.2 * width(confusion)
    assert width(confusion, level=0.5) < width(confusion)
    assert bootstrap(np.array([[5, 0]]))["accuracy"] == (1, 1)


def test_order_sensitivity():
    truth = ["a", "a", "b", "b"]
    orders = [["a", "a", "b", "b"], ["a", "b", "b", "x"], ["a", "a", "b", "y"]]
    found = order_sensitivity(truth, orders, "ab", "accuracy")
    assert found == {"spread": 0.5, "changed": 0.5}  # accuracies 1, 0.5, 0.75; the second and the last clip
    assert order_sensitivity(truth, orders[:1] * 2, "ab", "accuracy") == {"spread": 0, "changed": 0}
    assert order_sensitivity(truth, [["x"] * 4, ["y"] * 4], "ab", "accuracy") == {"spread": 0, "changed": 0}
    assert order_sensitivity(truth, orders, "ab", "uar")["spread"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((["a"], ["a", "b"], "ab"), {}, ValueError, "1 true labels and 2 predictions"),
        (([], [], "ab"), {}, UserError, "no clips"),
        ((["a", "c"], ["a", "a"], "ab"), {}, UserError, "clip 1 has the label 'c'"),
        ((["a"], ["a"], "ab"), {"invalid": "neutral"}, UserError, "no label 'neutral'"),
        ((["a"], ["a"], "ab"), {"invalid": "wrong"}, ValueError, "choose one of invalid, neutral"),
    ],
)
def test_what_cannot_be_counted(arguments, settings, error, message):
    with pytest.raises(error, match=message):
        confusion_matrix(*arguments, **settings)
