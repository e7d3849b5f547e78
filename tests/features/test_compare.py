"""Feature sets beside each other: each verdict on sets made to deserve it, and sets read from all that holds them."""

import json
import math

import numpy as np
import pytest

from emollama_jax.data.recipe import Recipe
from emollama_jax.errors import UserError
from emollama_jax.features.compare import INTERCHANGEABLE, MIXED, PREPROCESSING, SAME, UNDECIDED, compare
from emollama_jax.features.feature_sets import Features, FeatureSet, read_feature_set
from emollama_jax.text.labels import MERR
from tests.data.prepared import SIZE as IMAGE_SIZE
from tests.data.prepared import random_record, write_data

CLIPS, SIZE = 60, 1024
RANDOM = np.random.default_rng(0)
COMMON = 3 * RANDOM.normal(size=SIZE)  # the direction that all clips of an encoder share
OWN = RANDOM.normal(size=(CLIPS, SIZE))
BASE = COMMON + OWN
NOISE = RANDOM.normal(size=(CLIPS, SIZE))
OTHER_AXES = np.linalg.qr(RANDOM.normal(size=(SIZE, SIZE)))[0]


def set_of(rows, names=None, modality="mae", **known):
    names = names or [f"clip{i:02d}" for i in range(len(rows))]
    index = {name: i for i, name in enumerate(names)}
    return FeatureSet("made", {modality: Features(index, np.asarray(rows, np.float32))}, **known)


def judged(rows, base=BASE):
    return compare(set_of(base), set_of(rows)).modalities["mae"]


@pytest.mark.parametrize(
    "rows, verdict",
    [
        (BASE, SAME),
        (BASE.astype(np.float16), SAME),
        (BASE + 1e-3 * NOISE, SAME),
        (BASE * 1.0005, SAME),
        (BASE * 1.01, INTERCHANGEABLE),
        (BASE + 0.1 * NOISE, INTERCHANGEABLE),
        (BASE + 0.02 * NOISE[0], INTERCHANGEABLE),
        (BASE + 0.4 * NOISE, PREPROCESSING),
        (COMMON + 0.6 * OWN + 0.8 * NOISE, PREPROCESSING),
        (BASE * 1.2, PREPROCESSING),
        (BASE + 0.6 * NOISE[0], PREPROCESSING),
        (COMMON + NOISE, MIXED),
        (np.roll(BASE, 1, axis=0), MIXED),
        (BASE @ OTHER_AXES, MIXED),
        (OWN, MIXED),
        (-BASE, MIXED),
        (BASE[:, :512], MIXED),
        (BASE * 0, MIXED),
    ],
    ids=[
        *("itself", "float16", "rounded", "0.05 % larger", "1 % larger", "noise", "moved a little", "much noise"),
        *("another crop", "20 % larger", "moved", "other clips", "names shifted", "another encoder", "centred already"),
        *("turned around", "another size", "zeros"),
    ],
)
def test_each_verdict_is_given_where_it_is_deserved(rows, verdict):
    assert judged(rows).verdict == verdict
    assert compare(set_of(rows), set_of(BASE)).verdict == verdict  # it has no side


def test_the_plain_cosine_would_have_passed_other_clips():
    """Why the means are taken away, and why mismatched clips stand beside."""
    found = judged(np.roll(BASE, 1, axis=0))
    assert found.cosine.least > 0.85 and abs(found.cosine.mean - found.cosine.mismatched) < 0.01
    assert abs(found.centred.mean) < 0.05 and abs(found.centred.mismatched) < 0.05


def test_the_numbers_are_what_they_are_called():
    rows = 0.9 * BASE + 0.2 * NOISE + 0.1
    found, a, b = judged(rows), *(np.float32(x).astype(np.float64) for x in (BASE, rows))
    norm = np.linalg.norm
    cosine = lambda x, y: (x * y).sum(1) / (norm(x, axis=1) * norm(y, axis=1))
    for ours, (x, y) in ((found.cosine, (a, b)), (found.centred, (a - a.mean(0), b - b.mean(0)))):
        by_clip = cosine(x, y)
        expected = by_clip.mean(), np.percentile(by_clip, 5), by_clip.min(), cosine(x, np.roll(y, CLIPS // 2, 0)).mean()
        assert (ours.mean, ours.low, ours.least, ours.mismatched) == pytest.approx(expected, abs=1e-6)
    assert found.worst[0] == (f"clip{by_clip.argmin():02d}", pytest.approx(by_clip.min(), abs=1e-6))
    assert [c for _, c in found.worst] == pytest.approx(sorted(by_clip)[:5], abs=1e-6)
    for ours, x in ((found.a, a), (found.b, b)):
        assert (ours.mean, ours.std, ours.norm) == pytest.approx((x.mean(), x.std(), norm(x, axis=1).mean()), rel=1e-6)
    sizes = (norm(a, axis=1).mean() + norm(b, axis=1).mean()) / 2
    assert found.difference == pytest.approx(norm(a - b, axis=1).mean() / sizes, rel=1e-5)
    spread = (norm(a - a.mean(0), axis=1).mean() + norm(b - b.mean(0), axis=1).mean()) / 2
    assert found.means_distance == pytest.approx(norm(a.mean(0) - b.mean(0)) / spread, rel=1e-5)
    assert found.means_cosine == pytest.approx(cosine(a.mean(0)[None], b.mean(0)[None])[0], abs=1e-6)


def test_a_clip_that_is_another_is_named():
    rows = BASE.copy()
    rows[7] = COMMON + NOISE[7]
    result = compare(set_of(BASE), set_of(rows))
    assert result.verdict == INTERCHANGEABLE
    assert result.modalities["mae"].odd == ("clip07",) and result.modalities["mae"].worst[0][0] == "clip07"
    assert "Look at 1 clips that are unlike: clip07." in result.sentence
    assert "worst of mae: clip07 " in str(result)


def test_few_clips_are_told_the_same_or_not_told():
    assert judged(BASE[:1], BASE[:1]).verdict == SAME
    assert math.isnan(judged(BASE[:1], BASE[:1]).cosine.mismatched)
    assert judged(NOISE[:2], BASE[:2]).verdict == UNDECIDED
    assert judged(NOISE[:3], BASE[:3]).verdict == MIXED
    assert judged(np.repeat(BASE[:1], 4, 0), np.repeat(BASE[:1], 4, 0)).verdict == SAME


def test_clips_are_joined_by_name():
    order = RANDOM.permutation(CLIPS)
    names = [f"clip{i:02d}" for i in order[:50]] + [f"new{i}" for i in range(7)]
    found = compare(set_of(BASE), set_of([*BASE[order[:50]], *NOISE[:7]], names)).modalities["mae"]
    assert (found.verdict, found.common, found.only_a, found.only_b) == (SAME, 50, 10, 7)


def test_the_worst_modality_decides_and_the_sentence_says_which():
    a, b = (
        FeatureSet(where, {"mae": set_of(BASE).modalities["mae"], name: set_of(rows).modalities["mae"], **further})
        for where, rows, name, further in (
            ("a", BASE, "hubert", {}),
            ("b", BASE @ OTHER_AXES, "hubert", {"videomae": set_of(BASE).modalities["mae"]}),
        )
    )
    result = compare(a, b)
    assert result.verdict == MIXED
    assert result.sentence.startswith("The sets are not to be mixed")
    assert "By modality: mae the same, hubert not to be mixed." in result.sentence
    assert "Only B has videomae." in result.sentence and result.missing == {"a": (), "b": ("videomae",)}


def test_the_encoders_fingerprints_are_shown():
    row = lambda a, b: next(line for line in str(compare(a, b)).splitlines() if line.startswith("encoders")).split()[1:]
    one, other, none = (set_of(BASE, fingerprints=f) for f in ({"mae": "1a2b"}, {"mae": "3c4d"}, {}))
    assert row(one, one) == ["the", "same"]
    assert row(one, other) == ["1a2b", "/", "3c4d"]
    assert row(one, none) == ["not", "known"]


def test_the_result_is_a_table_and_json():
    result = compare(set_of(BASE), set_of(BASE + 0.1 * NOISE))
    lines = str(result).splitlines()
    assert lines[:2] == ["A  made", "B  made"] and lines[-1] == result.sentence
    assert "standard deviation A / B" in str(result) and max(map(len, lines)) < 200
    read = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert read["verdict"] == INTERCHANGEABLE and read["sentence"] == result.sentence
    assert read["modalities"]["mae"]["centred"]["mean"] == result.modalities["mae"].centred.mean
    alone = json.loads(json.dumps(compare(set_of(BASE[:1]), set_of(BASE[:1])).to_dict(), allow_nan=False))
    assert alone["modalities"]["mae"]["cosine"]["mismatched"] is None


def test_nothing_in_common_is_refused():
    with pytest.raises(UserError, match="no clip in common: A has 'clip00' and others, B 'x'"):
        compare(set_of(BASE), set_of(BASE[:1], ["x"]))
    with pytest.raises(UserError, match="no modality in common: made has mae, made has hubert; .*mae=FOLDER"):
        compare(set_of(BASE), set_of(BASE, modality="hubert"))


def write_npy(folder, rows, names=None):
    folder.mkdir(parents=True)
    for i, row in enumerate(rows):
        np.save(folder / f"{names[i] if names else f'clip{i}'}.npy", np.float32(row))
    return folder


def test_folders_are_read_as_the_reference_keeps_them(tmp_path):
    root = tmp_path / "MER"
    for number, name in enumerate(("mae_340_UTT", "maeV_399_UTT", "HL-UTT")):
        write_npy(root / "features" / name, BASE[:4] + number)
    three = read_feature_set(root)
    assert list(three.modalities) == ["mae", "videomae", "hubert"]
    assert three.modalities["hubert"].rows == pytest.approx(np.float32(BASE[:4] + 2))
    assert list(read_feature_set(root / "features/maeV_399_UTT").modalities) == ["videomae"]
    frames = write_npy(tmp_path / "mine", [np.stack([row + 1, row + 3]) for row in BASE[:4]])  # [T, D] is averaged
    assert compare(f"hubert={frames}", root).verdict == SAME
    assert compare(frames, root / "features/HL-UTT").modalities.keys() == {"hubert"}
    with pytest.raises(UserError, match="no modality in common: .*mine has features, .*MER has mae, videomae, hubert"):
        compare(frames, root)


def test_names_of_digits_and_damaged_files(tmp_path):
    a = write_npy(tmp_path / "mae_340_UTT", BASE[:3], ["00007", "00012", "x"])
    b = write_npy(tmp_path / "b", BASE[:4], ["7", "12", "x", "y"])
    (b / "y.npy").write_bytes((b / "y.npy").read_bytes()[:99])
    (b / "notes.txt").touch()
    result = compare(a, b)
    assert result.verdict == SAME and result.modalities["mae"].common == 3
    assert len(result.problems) == 1 and "y.npy" in result.problems[0]
    assert "1 files could not be read, the first: " in result.sentence
    with pytest.raises(UserError, match="no features in .*; the first of 1 problems: .*y.npy"):
        read_feature_set(write_damaged(tmp_path / "c"))


def write_damaged(folder):
    folder.mkdir()
    (folder / "y.npy").write_bytes(b"no numbers")
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two data sets of the same features: one of two splits, the second has rounded ones and another encoder."""
    recipe = Recipe(labels=MERR, size=IMAGE_SIZE, image_tokens_shape=(17, 48))
    rng, root, paths = np.random.default_rng(0), tmp_path_factory.mktemp("prepared"), []
    for name, dtype, encoder in (("a", np.float32, "1a2b"), ("b", np.float16, "3c4d")):
        records = [
            random_record(
                i,
                rng,
                recipe,
                features=np.stack([BASE[i], OWN[i], NOISE[i]]).astype(dtype).astype(np.float32),
                has_feature=np.array([True, i != 2, False]),
            )
            for i in range(8)
        ]
        counts = {"train": 8, "test": 8} if name == "a" else {"train": 8}
        paths.append(write_data(root / name, counts, records=records, encoders={"mae": encoder}))
    return paths


def test_prepared_data_sets_are_compared(prepared):
    a, b = prepared
    for first in (a, f"{a}:test"):
        result = compare(first, b)
        assert result.verdict == SAME and list(result.modalities) == ["mae", "videomae"]
        assert result.modalities["videomae"].common == 7  # one clip has none
        assert result.modalities["mae"].fingerprints == ("1a2b", "3c4d")
        assert 0 < result.modalities["mae"].difference < 1e-3


def test_a_prepared_data_set_is_compared_with_a_folder(prepared, tmp_path):
    folder = write_npy(tmp_path / "mae_340_UTT", BASE[:5], [f"clip {i}" for i in range(5)])
    result = compare(prepared[0], folder)
    assert result.modalities.keys() == {"mae"} and result.missing["a"] == ("videomae",)
    found = result.modalities["mae"]
    assert (found.verdict, found.common, found.only_a, found.difference) == (SAME, 5, 3, 0.0)


def test_what_holds_no_features_is_refused(prepared, tmp_path):
    (tmp_path / "empty").mkdir()
    for where, problem in (
        (tmp_path / "empty", "no features in .*empty; give a folder of .npy files"),
        (tmp_path / "none", "no such folder: .*none; give FOLDER, FOLDER:SPLIT or one of mae, videomae, hubert=FOLDER"),
        (f"mae={tmp_path / 'none'}", "cannot list the folder .*none"),
        (f"{prepared[0]}:dev", "no split 'dev': .*; it has "),
        (f"{tmp_path / 'empty'}:train", "no prepared data set: .*empty"),
    ):
        with pytest.raises(UserError, match=problem) as caught:
            compare(where, prepared[1])
        assert "\n" not in str(caught.value)
