"""One table out of the files of three tools, and the peak by combinations of units."""

import json
import math

import numpy as np
import pytest

from emollama_jax.errors import UserError
from emollama_jax.media.action_units import OPENFACE3_UNITS, read_action_units
from emollama_jax.media.peak import openface_peak
from emollama_jax.media.unit_rules import UnitRule, find_unit_peak, labels_out_of_reach, read_rules
from emollama_jax.synthetic.action_units import SOURCES, write_action_units
from emollama_jax.synthetic.clip import clip_spec, peak_aus
from emollama_jax.synthetic.dataset import SEEN

BY_FACE = {"smile": "happy", "drawn": "sad", "wide": "surprise"}


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def openface(path, rows, units=("AU04", "AU05", "AU09", "AU20", "AU25", "AU26", "AU45")):
    """Rows of the units' intensities; None is a frame that failed, with values all the same."""
    lines = ["frame,timestamp,confidence,success," + ",".join(f"{u}_r" for u in units)]
    for i, row in enumerate(rows):
        values = ",".join(map(str, row or [5.0] * len(units)))
        lines.append(f"{i + 1},{i / 25:.3f},0.9,{int(row is not None)},{values}")
    return write(path, *lines)


# The table


@pytest.mark.parametrize(
    "header", ["frame, face_id, timestamp, confidence, success", "frame,timestamp,confidence,success"]
)
def test_headers_of_openface_2_old_and_new_give_one_table(tmp_path, header):
    rows = ["1,0,0.00,0.9,1,", "2,0,0.04,0.9,0,", "3,0,0.08,0.9,1,"]
    if "face_id" not in header:
        rows = [row.replace(",0,", ",", 1) for row in rows]
    values = ["0.50,1.25,1,1,0", "9,9,1,1,1", "0.00,2.00,0,1,1"]
    sep = ", " if ", " in header else ","
    lines = [header + sep + sep.join(["AU01_r", "AU12_r", "AU01_c", "AU12_c", "AU28_c"])]
    table = read_action_units(write(tmp_path / "a.csv", *lines, *map("".join, zip(rows, values, strict=True))))
    assert (table.source, table.units) == ("openface2", ("AU01", "AU12", "AU28"))
    assert table.frames.tolist() == [0, 1, 2] and table.found.tolist() == [True, False, True]
    np.testing.assert_array_equal(table.intensity[[0, 2]], [[0.5, 1.25, math.nan], [0, 2, math.nan]])
    rows = list(table.rows())
    assert len(rows) == 6 and rows[1] == (0, "AU12", 1.25, 1.0, "openface2") and {row.frame for row in rows} == {0, 2}
    # Intensity decides where there is one (AU12 of frame 0 is present at 1.25), presence where there is none (AU28).
    np.testing.assert_array_equal(table.active(1.5), [[0, 0, 0], [0, 0, 0], [0, 1, 1]])


def test_openface_3_has_eight_units_without_names_and_libreface_numbers_for_names(tmp_path):
    cells = ["[0.1, 0, 0, 0.4, 0, 0.9, 0, 0]", "", "0 0 0 0 0 0 0 0.7"]
    table = read_action_units(write(tmp_path / "3.csv", "frame,au", *(f'{i},"{cell}"' for i, cell in enumerate(cells))))
    assert (table.source, table.units) == ("openface3", OPENFACE3_UNITS) and table.found.tolist() == [True, False, True]
    assert table.intensity[0, [0, 3, 5]].tolist() == [0.1, 0.4, 0.9] and np.isnan(table.present).all()
    with pytest.raises(UserError, match="line 2: not a row of numbers"):
        read_action_units(write(tmp_path / "b.csv", "frame,au", '0,"[1, 2]"'))
    lines = ["frame_idx,frame_time_in_ms,au_1,au_24,au_1_intensity,au_12_intensity", "0,0,1,1,2.5,0.5", "1,40,,,,"]
    table = read_action_units(write(tmp_path / "l.csv", *lines))
    assert (table.source, table.units) == ("libreface", ("AU01", "AU12", "AU24"))
    assert table.found.tolist() == [True, False] and table.active()[0].tolist() == [True, True, True]


def test_of_several_faces_one_is_taken_or_named(tmp_path):
    lines = ["frame,face_id,success,AU12_r", "1,0,1,1.0", "1,7,1,3.0", "2,7,1,3.0"]
    path = write(tmp_path / "a.csv", *lines)
    assert read_action_units(path).intensity.ravel().tolist() == [3.0, 3.0]
    assert read_action_units(path, person=2).intensity.ravel().tolist() == [1.0]
    with pytest.raises(UserError, match="no person 3; it has 2 faces"):
        read_action_units(path, person=3)


# The peak


def test_the_example_of_the_figure_of_emotion_llama(tmp_path):
    """AU05 and AU26 together say surprise; where only the jaw drops, more of it is no peak."""
    rows = [[0.0] * 7 for _ in range(9)]
    rows[1] = [0.10, 0.36, 0.02, 0.28, 0.0, 1.02, 0.0]
    rows[7] = [0.0, 0.0, 0.0, 0.0, 0.0, 1.25, 0.0]
    peak = find_unit_peak(read_action_units(openface(tmp_path / "a.csv", rows)))
    assert (peak.frame, peak.label) == (1, "surprise") and peak.score == pytest.approx(1.38)
    assert peak.active == {"AU05": 0.36, "AU26": 1.02}


def test_blinks_and_failed_frames_are_never_the_peak(tmp_path):
    rows = [[0.0] * 7 for _ in range(20)]
    rows[5] = [0.0, 4.0, 0.0, 0.0, 0.0, 4.0, 3.0]  # a blink, in which the units jump
    rows[9] = None
    rows[14] = [0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    path = openface(tmp_path / "a.csv", rows)
    assert find_unit_peak(read_action_units(path)).frame == 14 and openface_peak(path) == 14
    shut = [[0.0, 1.0, 0.0, 0.0, 0.0, 1.0 + (i == 6), 3.0] for i in range(20)]  # not a blink: for 0.8 s
    assert find_unit_peak(read_action_units(openface(tmp_path / "b.csv", shut))).frame == 6


def test_one_unit_alone_is_a_last_resort(tmp_path):
    talk = [[0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0] for _ in range(5)]
    path = openface(tmp_path / "a.csv", [*talk, [0.0, 0.5, 0.0, 0.0, 0.5, 0.5, 0.0]])
    assert (find_unit_peak(read_action_units(path)).label, find_unit_peak(read_action_units(path)).frame) == (
        "surprise",
        5,
    )
    assert find_unit_peak(read_action_units(openface(tmp_path / "b.csv", talk))).label == "doubt"
    calm = [[0.1] * 7] * 5
    assert find_unit_peak(read_action_units(openface(tmp_path / "c.csv", calm))) is None


def test_worried_needs_both_of_its_units_of_which_one_has_no_intensity(tmp_path):
    lines = ["frame,success,AU20_r,AU28_c", "1,1,1.5,0", "2,1,1.0,1"]
    peak = find_unit_peak(read_action_units(write(tmp_path / "a.csv", *lines)))
    assert (peak.frame, peak.label, peak.active) == (1, "worried", {"AU20": 1.0, "AU28": 1.0})
    libreface = read_action_units(
        write(tmp_path / "b.csv", "frame_idx,au_20_intensity,au_6_intensity,au_12_intensity", "0,1,1,1")
    )
    assert "worried" in labels_out_of_reach(libreface) and "happy" not in labels_out_of_reach(libreface)


@pytest.mark.parametrize("source", SOURCES)
def test_peaks_and_emotions_of_synthetic_clips(tmp_path, source):
    """The peak within a frame in 95 % of the clips, and the emotion that a face alone tells."""
    specs = [clip_spec("train", i, seed=3) for i in range(80)]
    write_action_units(specs, tmp_path, source)
    near, told, right, hits, claimed, true = 0, 0, 0, 0, 0, 0
    for spec in specs:
        table = read_action_units(tmp_path / f"{spec.name}.csv")
        peak = find_unit_peak(table)
        if peak is None:
            continue
        near += abs(peak.frame - spec.peak_index) <= 1
        if spec.factors.face in BY_FACE:
            told += 1
            right += peak.label == BY_FACE[spec.factors.face]
        seen = {unit for unit, value in peak_aus(spec).items() if value >= SEEN} & set(table.units)
        hits, claimed, true = hits + len(seen & set(peak.active)), claimed + len(peak.active), true + len(seen)
    print(
        f"{source}: peak within a frame {near}/80, emotion {right}/{told}, units' F1 {2 * hits / (claimed + true):.3f}"
    )
    assert near >= 76 and 2 * hits / (claimed + true) > 0.9
    assert right >= 0.95 * told


# Rules


def test_rules_are_data(tmp_path):
    path = tmp_path / "rules.json"
    path.write_text(json.dumps({"rules": [{"label": "smiles", "units": ["AU06", "au12", 14], "mean": 0.5}]}))
    assert read_rules(path) == (UnitRule("smiles", ("AU06", "AU12", "AU14"), 2, 0.5),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not rules"),
        ('{"rules": []}', "holds no rule"),
        ('{"rules": [{"label": "a"}]}', "not rules"),
        ('{"rules": [{"label": "a", "units": ["AU06"], "at_least": 2}]}', "needs 1 to all of its units"),
        ('{"rules": [{"label": "a", "units": ["nose"]}]}', "not rules"),
    ],
)
def test_what_is_no_rule_is_a_line(tmp_path, text, message):
    (tmp_path / "rules.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_rules(tmp_path / "rules.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read"):
        read_rules(tmp_path / "none.json")
