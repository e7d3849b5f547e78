"""Emotion wheels: labels go to groups as the challenge's scorer sends them, oddities included."""

import json
import shutil

import numpy as np
import pytest

from emollama_jax.errors import UserError
from emollama_jax.eval.wheels import EmotionWheels
from tests.eval.wheel_tables import challenge_tables, write_tables


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("wheels") / "tables")


def write_mapping(wheels: EmotionWheels, path) -> None:
    """As MER2026 ships it: three dictionaries, pickled."""
    whole = {f"wheel{w}": {} for w in range(1, 6)}
    for (wheel, level), words in wheels.clusters.items():
        whole[f"wheel{wheel}"][f"level{level}"] = dict(words)
    arrays = {"format_mapping": wheels.bases, "raw_mapping": wheels.wheel_words, "wheel_map_whole": whole}
    np.savez(path, **{name: np.array(value, object) for name, value in arrays.items()})


@pytest.mark.smoke
def test_from_a_form_to_a_group(small):
    wheels = EmotionWheels.load(small)
    assert wheels.group("Gladly ", wheel=1) == "happy" and wheels.group("glad", wheel=1, level=2) == "joyful"
    assert wheels.group("fury", wheel=1) == "mad" and wheels.group("fury", wheel=2) == "bad"
    assert wheels.group("amazed", wheel=1) is None and wheels.group("amazed", wheel=2) == "surprised"
    assert wheels.group("neutral", wheel=1) is None
    assert wheels.group("cold", wheel=1, level=2) == "bitter"  # a blank cell repeats the one above
    assert wheels.group("mad", wheel=1, level=2) == "angry"  # the first of its level-2 words
    assert wheels.group("mixed", wheel=1) == "mad"  # of angry and joyful the first in alphabetical order
    assert wheels.groups(["glad", "joyful", "down", "neutral"], wheel=1) == {"happy", "sad"}
    assert "thrilled" in wheels.vocabulary and wheels.origin == "tables"


def test_the_mapping_of_2026_is_the_same_mapping(small, tmp_path):
    wheels = EmotionWheels.load(small)
    write_mapping(wheels, tmp_path / "wheel_mapping.npz")
    for path in (tmp_path / "wheel_mapping.npz", tmp_path):
        found = EmotionWheels.load(path)
        assert found.fingerprint == wheels.fingerprint and found.origin == "wheel_mapping.npz"
        assert found.group("gladly", wheel=1) == "happy"


def test_what_is_no_wheel_is_one_line(small, tmp_path):
    with pytest.raises(UserError, match=r"no format\.csv in .*; give the folder"):
        EmotionWheels.load(tmp_path)
    folder = tmp_path / "damaged"
    shutil.copytree(small, folder)
    (folder / "wheel3.xlsx").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="damaged: .*wheel3.xlsx"):
        EmotionWheels.load(folder)
    (folder / "wheel3.xlsx").write_bytes((folder / "synonym.xlsx").read_bytes())
    with pytest.raises(UserError, match="level1, level2, level3"):
        EmotionWheels.load(folder)


def test_a_mapping_that_would_run_something_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (json.dumps, ("x",))

    np.savez(tmp_path / "wheel_mapping.npz", format_mapping=np.array(Evil(), object))
    with pytest.raises(UserError, match="holds an object of json.dumps"):
        EmotionWheels.load(tmp_path / "wheel_mapping.npz")


def test_the_challenge_tables_and_their_oddities():
    wheels = EmotionWheels.load(challenge_tables())
    assert (len(wheels.bases), len(wheels.wheel_words), len(wheels.vocabulary)) == (7386, 1255, 253)
    groups = [sorted(set(wheels.clusters[wheel, 1].values())) for wheel in range(1, 6)]
    assert groups[0] == ["disgusted", "happy", "mad", "sad", "scared", "surprised"]
    assert groups[1] == ["angry", "bad", "disgusted", "fearful", "happy", "sad", "surprised"]
    assert groups[2] == groups[4] == ["joyful", "mad", "peaceful", "powerful", "sad", "scared"]
    assert groups[3] == ["anger", "disgust", "fear", "genius", "joy", "sad"]
    of = lambda label: [wheels.group(label, wheel=wheel) for wheel in range(1, 6)]
    assert of("neutral") == [None] * 5
    assert of("surprise") == ["surprised", "surprised", "powerful", "fear", None]
    assert of("happy")[4] == "powerful"
    assert of("contempt") == [None, "angry", None, None, None]
    assert set(of("doubt")) == {"mad", "angry", "anger"}


def test_the_challenge_tables_by_a_plain_second_reading():
    """pandas reads the files, loops go through them; all word forms get the same groups in all wheels and levels."""
    pandas = pytest.importorskip("pandas")
    folder = challenge_tables()
    wheels = EmotionWheels.load(folder)
    bases: dict[str, set[str]] = {}
    for _, row in pandas.read_csv(folder / "format.csv", keep_default_na=False).iterrows():
        for form in [*row["format"].split(","), row["name"]]:
            if form.strip():
                bases.setdefault(form.strip(), set()).add(row["name"])
    synonyms: dict[str, set[str]] = {}
    table = pandas.read_excel(folder / "synonym.xlsx")
    for run in range(1, 9):
        for word, others in zip(table[f"word_run{run}"], table[f"synonym_run{run}"], strict=True):
            for other in [*str(others).replace("'", ",").split(","), word]:
                if other.strip():
                    synonyms.setdefault(other.strip().lower(), set()).add(word.strip().lower())
    for wheel in range(1, 6):
        tree = pandas.read_excel(folder / f"wheel{wheel}.xlsx").ffill()
        tree = tree.map(lambda cell: cell.strip().lower())
        for level in (1, 2):
            cluster = {}
            for first in dict.fromkeys(tree.level1):
                below = tree[tree.level1 == first]
                cluster[first] = first if level == 1 else sorted(below.level2)[0]
                for second in dict.fromkeys(below.level2):
                    for word in [second, *below[below.level2 == second].level3]:
                        cluster[word] = first if level == 1 else second
            for form, names in bases.items():
                candidates = sorted(word for name in names for word in synonyms[name])
                expected = next((cluster[word] for word in candidates if word in cluster), None)
                assert wheels.group(form, wheel=wheel, level=level) == expected, (form, wheel, level)
