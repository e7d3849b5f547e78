"""Features of clips in `.npy` files, sound and damaged."""

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from emollama_jax.data.annotations import read_annotations
from emollama_jax.data.clip_files import read_feature
from emollama_jax.errors import UserError
from tests.data.annotation_samples import ONES, files_of, read, save, told, write


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


BROKEN = {
    "wrong_shape": [np.ones(1023), np.ones((2, 3, 1024)), np.ones((1024, 1)), np.ones((0, 1024)), np.float32(1)],
    "not_finite": [ONES * np.nan, ONES * np.inf, ONES.astype(np.float64) * 1e300],
    "unreadable_feature": [ONES.astype(complex), ONES.astype(str), ONES > 0, np.zeros(1024, [("x", "f4")])],
}


@pytest.mark.parametrize(("kind", "array"), [(kind, array) for kind, arrays in BROKEN.items() for array in arrays])
@pytest.mark.parametrize("which", [0, 2])
def test_broken_features(tmp_path, kind, array, which):
    for folder in ("0", "1", "2"):
        save(tmp_path / folder / "a.npy")
        broken = save(tmp_path / folder / "b.npy", array if folder == str(which) else ONES)
    broken = tmp_path / str(which) / "b.npy"
    folders = (tmp_path / "0", tmp_path / "1", tmp_path / "2")
    lists = write(tmp_path / "train.txt", "a sad\nb sad\n")
    found = read(lists, features=folders)
    assert told(found) == [(kind, "b", None)]
    assert found.problems[0].file == str(broken)
    assert found.clips[0].has_feature == (True, True, True)
    assert found.clips[1].has_feature == tuple(i != which for i in range(3))
    with pytest.raises(UserError, match=re.escape(f"{broken}: {found.problems[0].message}")):
        read_feature(broken)
    unchecked = read_annotations(files_of(lists, features=folders), check_features=False)
    assert unchecked.problems == () and unchecked.clips[1].has_feature == (True, True, True)


def test_pickles_are_never_read(tmp_path):
    made = tmp_path / "made"
    payload = np.full(1024, Touch(made), object)
    save(tmp_path / "mae" / "a.npy", payload, allow_pickle=True)
    save(tmp_path / "mae" / "b.npy", np.zeros(1024, [("x", "O")]), allow_pickle=True)
    write(tmp_path / "mae" / "c.npy", pickle.dumps(Touch(made)))
    lists = write(tmp_path / "train.txt", "a sad\nb sad\nc sad\n")
    found = read(lists, features=(tmp_path / "mae", None, None))
    assert told(found) == [("object_dtype", "a", None), ("object_dtype", "b", None), ("unreadable_feature", "c", None)]
    assert [clip.features for clip in found.clips] == [(None, None, None)] * 3
    assert not made.exists()
    np.load(tmp_path / "mae" / "a.npy", allow_pickle=True)
    assert made.exists()  # so the payload does work


def cut(content: bytes) -> bytes:
    return content[:-1]


def header_only(content: bytes) -> bytes:
    return content[:128].replace(b"(1024,), }", b"(1000000000000, 1024), }")


@pytest.mark.parametrize(
    "damage", [cut, header_only, lambda content: b"", lambda content: content[:20], bytes.swapcase]
)
def test_damaged_features(tmp_path, damage):
    content = damage(save(tmp_path / "sound.npy").read_bytes())
    path = write(tmp_path / "mae" / "a.npy", content)
    found = read(write(tmp_path / "train.txt", "a sad"), features=(path.parent, None, None))
    assert told(found) == [("unreadable_feature", "a", None)]
    assert "\n" not in found.problems[0].message


@pytest.mark.parametrize("dtype", ["f2", "f4", ">f4", "f8", "i2"])
@pytest.mark.parametrize("shape", [(1024,), (1, 1024), (7, 1024)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_features(tmp_path, dtype, shape, order):
    array = np.random.default_rng(0).normal(size=shape, scale=9).astype(dtype, order=order)
    feature = read_feature(save(tmp_path / "a.npy", array))
    assert feature.shape == (1024,) and feature.dtype == np.float32
    np.testing.assert_allclose(feature, array.astype(np.float64).reshape(-1, 1024).mean(0), rtol=1e-6, atol=1e-6)
    if array.size == 1024:
        np.testing.assert_array_equal(feature, array.reshape(1024).astype(np.float32))


def test_a_feature_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"a\.npy: cannot be read \(No such file or directory\); extract"):
        read_feature(tmp_path / "a.npy")


def test_features_with_newer_headers(tmp_path):
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, ONES, version=(2, 0))
    np.testing.assert_array_equal(read_feature(path), ONES)
