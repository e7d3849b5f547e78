"""Metrics of open-vocabulary labels: worked examples by hand, and a second, plain implementation on random cases."""

from fractions import Fraction
from statistics import fmean

import numpy as np
import pytest

from emollama_jax.errors import UserError
from emollama_jax.eval.open_vocabulary import (
    combined_score,
    constant_answers,
    hits,
    mean_hits,
    mean_list_length,
    resample,
    sentiment_of,
    sentiment_scores,
    set_overlaps,
    set_score,
    synonym_set_scores,
)
from emollama_jax.eval.wheels import EmotionWheels

# Two groups of level 1, a and b, with two words of level 2 each; "z" is in no wheel. Wheels 2 to 5 lack "b2".
WORDS = {"a1": "a", "a2": "a", "b1": "b", "b2": "b", "c1": "c"}
NAMES = [*WORDS, "z"]


def make_wheels(missing=("b2",)) -> EmotionWheels:
    same = {word: [word] for word in WORDS}
    clusters = {}
    for wheel in range(1, 6):
        known = {word: group for word, group in WORDS.items() if wheel == 1 or word not in missing}
        clusters |= {(wheel, 1): known, (wheel, 2): {word: word for word in known}}
    return EmotionWheels(same, same, clusters, "tables")


@pytest.fixture(scope="module")
def wheels():
    return make_wheels()


@pytest.mark.smoke
def test_a_set_score_done_by_hand():
    """The example of the module: P = (1/3 + 0) / 2, R = (1/2 + 0) / 2 over the two clips that count, F = 1/5."""
    same = make_wheels(missing=())
    truth = [["a1", "b1"], ["b1"], ["z"]]
    predictions = [["a2", "c1"], [], ["a1"]]
    overlaps = set_overlaps(truth, predictions, same, level=1)
    assert overlaps[0, 0].tolist() == [1 / 2, 1 / 2] and overlaps[0, 1].tolist() == [0, 0]
    assert np.isnan(overlaps[:, 2]).all()
    assert set_score(overlaps) == pytest.approx(float(Fraction(1, 4)))  # P = R = 1/4
    at_level_2 = set_overlaps(truth, predictions, same, level=2)
    assert set_score(at_level_2) == 0  # a2 is not a1: both means are 0, and so is F
    wider = set_overlaps([["a1", "b1"], ["b1"]], [["a1", "c1", "a2"], ["c1", "b1", "b2"]], same, level=2)
    precision, recall = Fraction(1, 3), Fraction(1, 2) * (Fraction(1, 2) + 1)
    assert set_score(wider) == pytest.approx(float(2 * precision * recall / (precision + recall)))


def test_a_clip_can_count_in_one_wheel_and_not_in_another(wheels):
    """b2 has no group in wheels 2 to 5: there the first clip alone counts."""
    truth, predictions = [["a1"], ["b2"]], [["a1"], ["c1"]]
    assert set_score(set_overlaps(truth, predictions, wheels, level=1)) == pytest.approx((1 / 2 + 4) / 5)
    hit, m_score = hits(["a1", "b2"], [["a1", "c1"], ["c1"]], wheels)
    assert mean_hits(hit) == pytest.approx((1 / 2 + 4) / 5)
    assert mean_hits(m_score) == pytest.approx((1 / 2 + 4) / 5)  # c is no candidate's group


def test_a_list_of_everything_hits_always_and_the_m_score_says_so(wheels):
    truth = ["a1", "b1", "c1", "z"]
    hit, m_score = hits(truth, [["a1", "b1", "c1"]] * 4, wheels)
    assert mean_hits(hit) == 1 and mean_hits(m_score) == pytest.approx(1 / 3)
    assert mean_list_length([["A1 ", "a1"], ["b1", "c1"], []]) == 1


def test_no_clip_that_counts_is_an_error(wheels):
    for found in (lambda: set_score(set_overlaps([["z"]], [["a1"]], wheels, level=1)),):
        with pytest.raises(UserError, match="no clip has a true label that stands in the wheels"):
            found()
    with pytest.raises(UserError, match="stands in the wheels"):
        mean_hits(hits(["z"], [["a1"]], wheels)[0])


def plain_set_score(truth, predictions, wheels, level):
    scores = []
    for wheel in range(1, 6):
        precisions, recalls = [], []
        for true, said in zip(truth, predictions, strict=True):
            table = wheels.clusters[wheel, level]
            g = {table[x] for x in true if x in table}
            p = {table[x] for x in said if x in table}
            if not g:
                continue
            common = sum(1 for group in g if group in p)
            precisions.append(common / len(p) if p else 0.0)
            recalls.append(common / len(g) if p else 0.0)
        p, r = fmean(precisions), fmean(recalls)
        scores.append(2 * p * r / (p + r) if p + r else 0.0)
    return fmean(scores)


def plain_hits(truth, predictions, wheels):
    rates, m_scores = [], []
    for wheel in range(1, 6):
        table = wheels.clusters[wheel, 1]
        candidates = {table[x] for x in truth if x in table}
        hit, m = [], []
        for true, said in zip(truth, predictions, strict=True):
            if true not in table:
                continue
            p = {table[x] for x in said if x in table}
            inside = [group for group in p if group in candidates]
            hit.append(1.0 if table[true] in p else 0.0)
            m.append(hit[-1] / len(inside) if inside else 0.0)
        rates.append(fmean(hit))
        m_scores.append(fmean(m))
    return fmean(rates), fmean(m_scores)


def test_a_second_implementation_agrees_on_1000_random_cases(wheels):
    rng = np.random.default_rng(0)
    draw = lambda least: list(rng.choice(NAMES, size=rng.integers(least, 5)))
    for _ in range(1000):
        clips = rng.integers(1, 8)
        truth = [["a1"], *(draw(1) for _ in range(clips))]
        predictions = [draw(0) for _ in truth]
        for level in (1, 2):
            found = float(set_score(set_overlaps(truth, predictions, wheels, level=level)))
            assert found == pytest.approx(plain_set_score(truth, predictions, wheels, level), abs=1e-12)
        single = [labels[0] for labels in truth]
        hit, m_score = hits(single, predictions, wheels)
        assert (float(mean_hits(hit)), float(mean_hits(m_score))) == pytest.approx(
            plain_hits(single, predictions, wheels), abs=1e-12
        )


def test_sentiments_are_scikit_learns_on_1000_random_cases():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    for _ in range(1000):
        clips = rng.integers(2, 12)
        truth = rng.choice([-2.0, -0.4, 0.0, 0.2, 3.0], size=clips)
        truth[0] = 1.0
        said = rng.choice(["positive", "neutral", "negative"], size=clips)
        kept = truth != 0
        t, p = truth[kept] > 0, said[kept] == "positive"
        found = sentiment_scores(truth.tolist(), said.tolist())
        assert found["weighted_f1"] == pytest.approx(
            metrics.f1_score(t, p, average="weighted", zero_division=0), abs=1e-12
        )
        assert found["accuracy"] == pytest.approx(metrics.accuracy_score(t, p), abs=1e-12)
    with pytest.raises(UserError, match="no clip has a sentiment other than 0"):
        sentiment_scores([0.0], ["positive"])


def test_the_sentiment_of_labels_is_that_of_most_groups():
    same = {word: [word] for word in ("joy", "grief", "wonder")}
    groups = {"joy": "happy", "grief": "sad", "wonder": "surprised"}
    wheels = EmotionWheels(same, same, {(w, level): groups for w in range(1, 6) for level in (1, 2)}, "tables")
    assert [sentiment_of(labels, wheels) for labels in (["joy"], ["grief", "joy", "grief"], ["wonder"], [], ["x"])] == [
        "positive", "negative", "neutral", "neutral", "neutral",
    ]  # fmt: skip
    assert sentiment_of(["Negative"], wheels) == "negative" and sentiment_of(["positive", "grief"], wheels) == "neutral"


def test_mer2024_ov_by_hand():
    """Clip 1: glad and happy are one; G = {happy, sad}, P = {happy, x}: 1/2, 1/2. Clip 2: nothing said. Clip 3: all."""
    truth = [["Happy", "sad"], ["angry"], ["calm", "warm"]]
    predictions = [["glad", "x"], [], ["calm", "WARM"]]
    found = synonym_set_scores(truth, predictions, [[["happy", "glad"]], [], [["calm", "warm"]]])
    assert found == pytest.approx({"accuracy": 1.5 / 3, "recall": 1.5 / 3, "average": 0.5})
    rng = np.random.default_rng(2)
    for _ in range(1000):
        groups = [list(part) for part in np.array_split(rng.permutation(NAMES), 3)]
        true, said = ([*rng.choice(NAMES, size=rng.integers(least, 4))] for least in (1, 0))
        place = {word: i for i, group in enumerate(groups) for word in group}
        g, p = {place[x] for x in true}, {place[x] for x in said}
        found = synonym_set_scores([true], [said], [groups])
        assert found["accuracy"] == pytest.approx(len(g & p) / len(p) if p else 0)
        assert found["recall"] == pytest.approx(len(g & p) / len(g) if p else 0)


def test_mer2023s_ranking_by_hand():
    assert combined_score(0.9, [1.0, -1.0], [0.0, -1.0]) == pytest.approx(0.9 - 0.25 * 0.5)


def test_constant_answers_and_intervals():
    truth = [["Sad", "angry"], ["sad"], ["angry", "calm"], ["sad"]]
    assert constant_answers(truth) == {"most frequent label": ("sad",), "all labels": ("sad", "angry", "calm")}
    right = np.array([1.0] * 60 + [0.0] * 40)
    low, high = resample(lambda counts: counts @ right / 100, 100)
    assert low == pytest.approx(0.50, abs=0.03) and high == pytest.approx(0.69, abs=0.03)  # 1.96 sqrt(.24 / 100)
