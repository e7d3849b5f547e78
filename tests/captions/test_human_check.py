"""The sheet for people: which clips are on it, and what a filled one says."""

import csv

import numpy as np
import pytest

from emollama_jax.captions.annotation import Annotation
from emollama_jax.captions.human_check import CLIPS, krippendorff_alpha, read_sheet, write_sheet
from emollama_jax.errors import UserError

MANY = [Annotation(f"{label}{i}", "", label=label, caption_coarse="x") for label in ("sad", "happy") for i in range(30)]


def fill(path, scores):
    with path.open() as file:
        rows = list(csv.reader(file))
    for row, given in zip(rows[1:], scores, strict=False):
        row[3 : 3 + len(given)] = map(str, given)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_a_sheet_has_some_clips_of_each_label_and_a_filled_one_stays(tmp_path):
    path = tmp_path / "human_check.csv"
    assert write_sheet(tmp_path, MANY) is None and read_sheet(path) is None
    with path.open() as file:
        labels = [row["emotion"] for row in csv.DictReader(file)]
    assert labels == ["happy"] * CLIPS + ["sad"] * CLIPS
    assert write_sheet(tmp_path, MANY[:30]) is None and "happy" not in path.read_text()  # not filled: written anew
    fill(path, [[4, 5], [2, 3]])
    before = path.read_bytes()
    found = write_sheet(tmp_path, MANY)
    assert path.read_bytes() == before
    assert (found.means, found.clips, found.raters) == ({"sad": 3.5}, 2, 2) and 0 < found.alpha < 1


@pytest.mark.parametrize("score", ["6", "good", "-1"])
def test_what_is_no_score_is_a_line(tmp_path, score):
    write_sheet(tmp_path, MANY)
    fill(tmp_path / "human_check.csv", [[score]])
    with pytest.raises(UserError, match=f"clip 1: '{score}' by rater_1 is no score from 0 to 5"):
        write_sheet(tmp_path, MANY)


def test_alpha():
    agree = np.array([[1.0, 1, 1], [4, 4, np.nan], [2, 2, 2]])
    assert krippendorff_alpha(agree) == 1
    # By hand: two clips of two scores, 1 2 and 3 4. Observed (1 + 1) * 2 / 4 = 1 of pairs, expected 40 / 12.
    assert krippendorff_alpha(np.array([[1.0, 2.0], [3.0, 4.0]])) == pytest.approx(1 - 1 / (40 / 12))
    assert krippendorff_alpha(np.array([[1.0, np.nan]])) is None and krippendorff_alpha(np.ones((3, 3))) is None
    noise = np.random.default_rng(0).integers(0, 6, (500, 5)).astype(float)
    assert abs(krippendorff_alpha(noise)) < 0.05
