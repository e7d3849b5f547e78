"""Sets of labels in files: in all the forms that the challenges have, and back."""

import numpy as np
import pytest

from emollama_jax.errors import UserError
from emollama_jax.eval.label_files import (
    labels_in,
    read_descriptions,
    read_label_sets,
    read_sentiments,
    read_synonyms,
    write_descriptions,
    write_label_sets,
)
from emollama_jax.io.npz_files import read_npz


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("['happy', 'Very sad']", ("happy", "very sad")),
        ("surprise, happy", ("surprise", "happy")),
        ("[]", ()),
        ("happy", ("happy",)),
        ("<think>sad?</think>[calm, calm, warm]", ("calm", "warm")),
        (["Happy ", ""], ("happy",)),
        (np.array(["a", "b"]), ("a", "b")),
    ],
)
def test_labels_of_several_emotions_are_read(text, labels):
    assert labels_in(text) == labels


@pytest.mark.smoke
def test_openset_files_in_and_out(tmp_path):
    labels = {"sample_00000000": ("happy", "relieved"), "00007": (), "b": ("sad",)}
    write_label_sets(tmp_path / "r-openset.npz", labels)
    found = np.load(tmp_path / "r-openset.npz")  # as the scorers read it, and without pickles
    assert found["filenames"].tolist() == list(labels) and found["fileitems"].tolist()[0] == "[happy, relieved]"
    assert read_label_sets(tmp_path / "r-openset.npz") == {
        "sample_00000000": ("happy", "relieved"),
        "7": (),
        "b": ("sad",),
    }
    items = np.empty(2, object)
    items[:] = [["Happy"], []]
    np.savez_compressed(tmp_path / "lists.npz", filenames=["a", "b"], fileitems=items)
    assert read_label_sets(tmp_path / "lists.npz") == {"a": ("happy",), "b": ()}
    np.savez(tmp_path / "gt.npz", a="happy", b="sad")
    assert read_label_sets(tmp_path / "gt.npz") == {"a": ("happy",), "b": ("sad",)}
    (tmp_path / "gt.csv").write_text("name,openset\na,\"['happy', 'proud']\"\nb,\n")
    assert read_label_sets(tmp_path / "gt.csv") == {"a": ("happy", "proud"), "b": ()}


def test_descriptions_in_and_out(tmp_path):
    write_descriptions(tmp_path / "r.npz", {"0001": "She smiles, happy at last."})
    assert np.load(tmp_path / "r.npz", allow_pickle=True)["name2reason"].tolist() == {
        "0001": "She smiles, happy at last."
    }
    assert read_descriptions(tmp_path / "r.npz") == {"1": "She smiles, happy at last."}
    with pytest.raises(UserError, match="holds descriptions, not labels"):
        read_label_sets(tmp_path / "r.npz")
    (tmp_path / "r.csv").write_text("names,chi_reasons\na,He frowns.\n")
    assert read_descriptions(tmp_path / "r.csv") == {"a": "He frowns."}


def test_sentiments_and_synonyms(tmp_path):
    (tmp_path / "s.csv").write_text("name,valence\na,-1.5\nb,0\n")
    (tmp_path / "l.csv").write_text("name,label\na,2\n")
    assert read_sentiments(tmp_path / "s.csv") == {"a": -1.5, "b": 0} and read_sentiments(tmp_path / "l.csv") == {
        "a": 2
    }
    (tmp_path / "l.csv").write_text("name,label\na,good\n")
    with pytest.raises(UserError, match="a sentiment is not a number"):
        read_sentiments(tmp_path / "l.csv")
    np.save(tmp_path / "0001.npy", "[['happy', 'glad'], ['sad']]")
    assert read_synonyms(tmp_path) == {"1": [["happy", "glad"], ["sad"]]}
    with pytest.raises(UserError, match=r"no \.npy"):
        read_synonyms(tmp_path / "none")


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 cut short", b"name,openset"])
def test_a_damaged_archive_is_one_line(tmp_path, data):
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(UserError, match="not a NumPy archive"):
        read_npz(tmp_path / "x.npz")
    with pytest.raises(UserError, match="cannot read"):
        read_npz(tmp_path / "none.npz")


def test_names_and_lists_that_do_not_match(tmp_path):
    np.savez(tmp_path / "a.npz", filenames=["a", "b"], fileitems=["x"])
    with pytest.raises(UserError, match="2 filenames and 1 fileitems"):
        read_label_sets(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", filenames=["7", "007"], fileitems=["x", "y"])
    with pytest.raises(UserError, match="is there twice"):
        read_label_sets(tmp_path / "a.npz")
