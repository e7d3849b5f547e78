"""Are two sets of features the same, or of the same kind? Compared clip by clip, by modality.

Features of one encoder share a large common direction, so that the plain cosine of *any* two clips is high and tells
little. So each set's mean is taken away as well, and the cosine of mismatched clips stands beside that of matching
ones. From these, over the clips in common, the verdict follows, the first that applies:

    the same                             cosine of every clip at least 0.9999, plain and centred, standard deviations
                                         within 0.1 %, means at most 0.01 apart: as float16 files change them
    interchangeable                      centred cosine of 95 clips in 100 at least 0.98, standard deviations within
                                         2 %, means at most 0.2 apart: as half precision in the encoder, another
                                         interpolation of the images or 20 ms of sound more or less change them
    same encoder, other preprocessing    mean centred cosine at least 0.3 and 0.3 above that of mismatched clips, and
                                         the means' cosine at least 0.8: the same axes mean the same things
    not to be mixed                      all else: other weights, another layer, or other clips of the same names
    undecided                            fewer than 3 clips in common, whose plain cosines do not make them the same

Means are apart in units of a clip's usual distance from its set's mean.
Clips whose centred cosine is below 0.5 where the sets as a whole are interchangeable are named: most often
a file of them is another one.

Axes: N clips, D feature size.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from emollama_jax.errors import UserError
from emollama_jax.features.feature_sets import UNNAMED, FeatureSet, read_feature_set
from emollama_jax.io.paths import PathLike

SAME = "the same"
INTERCHANGEABLE = "interchangeable"
PREPROCESSING = "same encoder, other preprocessing"
MIXED = "not to be mixed"
UNDECIDED = "undecided"
VERDICTS = (SAME, INTERCHANGEABLE, UNDECIDED, PREPROCESSING, MIXED)  # from good to bad

SENTENCES = {
    SAME: "The sets are the same.",
    INTERCHANGEABLE: "The sets are interchangeable: they differ no more than half precision or resampling makes them.",
    UNDECIDED: "Too few clips in common to tell.",
    PREPROCESSING: "The sets are of the same encoder on clips prepared differently: extract one of them again.",
    MIXED: "The sets are not to be mixed: a model trained on one does not understand the other.",
}
FEWEST = 3  # clips, without which means tell nothing
WORST = 5  # clips named


@dataclass(frozen=True, slots=True, kw_only=True)
class Cosines:
    """Of the clips of a set with those of the other."""

    mean: float
    low: float
    """The 5th percentile."""
    least: float
    mismatched: float
    """The mean with other clips; NaN where there is one clip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Of a set's features of the clips in common."""

    mean: float
    std: float
    """Of all numbers together: the scale."""
    norm: float
    """The mean over clips."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Modality:
    """What was found of one kind of feature; what clips in common tell is None where there are none."""

    verdict: str
    """One of VERDICTS."""
    common: int
    only_a: int
    only_b: int
    sizes: tuple[int, int]
    """D of each."""
    fingerprints: tuple[str | None, str | None]
    """Of the encoders; None where it is not known."""
    a: Moments | None = None
    b: Moments | None = None
    cosine: Cosines | None = None
    centred: Cosines | None = None
    """With each set's mean taken away."""
    means_cosine: float | None = None
    """Of the two means."""
    means_distance: float | None = None
    """Of the two means, in units of a clip's usual distance from its set's mean."""
    difference: float | None = None
    """The mean over clips of |a - b| as a part of the mean of |a| and |b|."""
    worst: tuple[tuple[str, float], ...] = ()
    """The clips of least cosine with it, centred where there are enough of them; the least first."""
    odd: tuple[str, ...] = ()
    """Clips that are unlike while the set is alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two feature sets beside each other."""

    a: str
    b: str
    modalities: Mapping[str, Modality]
    missing: Mapping[str, tuple[str, ...]]
    """The modalities that one set has alone, by `a` and `b`."""
    problems: tuple[str, ...]
    """Files that could not be read."""

    @property
    def verdict(self) -> str:
        """The worst of all modalities."""
        return max((modality.verdict for modality in self.modalities.values()), key=VERDICTS.index)

    @property
    def sentence(self) -> str:
        """The verdict in words, and what besides is to be looked at."""
        parts = [SENTENCES[self.verdict]]
        if len({modality.verdict for modality in self.modalities.values()}) > 1:
            parts.append("By modality: " + ", ".join(f"{n} {m.verdict}" for n, m in self.modalities.items()) + ".")
        if odd := sorted({name for modality in self.modalities.values() for name in modality.odd}):
            parts.append(f"Look at {len(odd)} clips that are unlike: {_some(odd)}.")
        for side, names in self.missing.items():
            if names:
                parts.append(f"Only {side.upper()} has {', '.join(names)}.")
        if self.problems:
            parts.append(f"{len(self.problems)} files could not be read, the first: {self.problems[0]}.")
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: all fields, the verdict and the sentence; NaN becomes None."""
        return _plain(dataclasses.asdict(self)) | {"verdict": self.verdict, "sentence": self.sentence}

    def __str__(self) -> str:
        rows = [("", *self.modalities)]
        for title, cell in _ROWS:
            rows.append((title, *(cell(modality) for modality in self.modalities.values())))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        worst = (
            f"worst of {name}: " + ", ".join(f"{clip} {cosine:.4f}" for clip, cosine in modality.worst)
            for name, modality in self.modalities.items()
            if modality.worst and modality.verdict != SAME
        )
        return "\n".join([f"A  {self.a}", f"B  {self.b}", "", *lines, "", *worst, self.sentence])


def compare(a: PathLike | FeatureSet, b: PathLike | FeatureSet) -> Comparison:
    """Compares two sets; `feature_sets.py` says how they are named.

    Raises:
        UserError: a set cannot be read, or they have no modality or no clip in common.
    """
    a, b = (side if isinstance(side, FeatureSet) else read_feature_set(side) for side in (a, b))
    a, b = _named_like(a, b), _named_like(b, a)
    if not (shared := [name for name in a.modalities if name in b.modalities]):
        has = [f"{side.where} has {', '.join(side.modalities)}" for side in (a, b)]
        raise UserError(f"no modality in common: {has[0]}, {has[1]}; name a folder's as in mae=FOLDER, or give others")
    modalities = {name: _compare(a, b, name) for name in shared}
    if not any(modality.common for modality in modalities.values()):
        first, second = (next(iter(side.modalities[shared[0]].index)) for side in (a, b))
        raise UserError(f"no clip in common: A has {first!r} and others, B {second!r}; names of clips must be the same")
    alone = lambda one, other: tuple(name for name in one.modalities if name not in other.modalities)
    missing = {"a": alone(a, b), "b": alone(b, a)}
    return Comparison(a=a.where, b=b.where, modalities=modalities, missing=missing, problems=a.problems + b.problems)


def _named_like(one: FeatureSet, other: FeatureSet) -> FeatureSet:
    """A folder whose name tells no modality has that of the other set, if this has one alone."""
    if set(one.modalities) != {UNNAMED} or len(other.modalities) != 1:
        return one
    return dataclasses.replace(one, modalities=dict.fromkeys(other.modalities, one.modalities[UNNAMED]))


def _compare(a: FeatureSet, b: FeatureSet, name: str) -> Modality:
    ours, theirs = a.modalities[name], b.modalities[name]
    clips = sorted(ours.index.keys() & theirs.index.keys())
    known: dict[str, Any] = {
        "common": len(clips),
        "only_a": len(ours.index) - len(clips),
        "only_b": len(theirs.index) - len(clips),
        "sizes": (ours.rows.shape[1], theirs.rows.shape[1]),
        "fingerprints": (a.fingerprints.get(name), b.fingerprints.get(name)),
    }
    if ours.rows.shape[1] != theirs.rows.shape[1]:
        return Modality(verdict=MIXED, **known)
    if not clips:
        return Modality(verdict=UNDECIDED, **known)
    x, y = (side.rows[[side.index[clip] for clip in clips]] for side in (ours, theirs))
    x_mean, y_mean = x.mean(axis=0, dtype=np.float64), y.mean(axis=0, dtype=np.float64)
    by_clip, x_norms, y_norms = _cosines(x, y), _norms(x), _norms(y)
    raw, size = _summary(by_clip, x, y), float((x_norms + y_norms).mean() / 2)
    measured: dict[str, Any] = {
        "a": _moments(x, x_norms),
        "b": _moments(y, y_norms),
        "cosine": raw,
        "difference": float(_norms(x - y).mean()) / size if size else 0.0,
    }
    odd = ()
    if len(clips) >= FEWEST:
        x, y = (x - x_mean).astype(np.float32), (y - y_mean).astype(np.float32)
        by_clip = _cosines(x, y)
        spread = float((_norms(x) + _norms(y)).mean() / 2)
        measured["centred"] = _summary(by_clip, x, y)
        measured["means_cosine"] = float(_cosines(x_mean[None], y_mean[None])[0])
        apart = float(np.linalg.norm(x_mean - y_mean))
        measured["means_distance"] = apart / spread if spread else (math.inf if apart else 0.0)
    verdict = _verdict(measured)
    if verdict == INTERCHANGEABLE:
        odd = tuple(clip for clip, cosine in zip(clips, by_clip, strict=True) if cosine < 0.5)
    order = np.argsort(by_clip, kind="stable")[:WORST]
    worst = tuple((clips[i], float(by_clip[i])) for i in order)
    return Modality(verdict=verdict, **known, **measured, worst=worst, odd=odd)


def _verdict(measured: Mapping[str, Any]) -> str:
    """By the rules of the module's docstring."""
    few = "centred" not in measured
    raw, centred, distance = (measured.get(name) for name in ("cosine", "centred", "means_distance"))
    scale = _apart(measured["a"].std, measured["b"].std)
    if raw.least >= 0.9999 and scale <= 0.001 and (few or (centred.least >= 0.9999 and distance <= 0.01)):
        return SAME
    if few:
        return UNDECIDED
    if centred.low >= 0.98 and scale <= 0.02 and distance <= 0.2:
        return INTERCHANGEABLE
    if centred.mean >= max(0.3, centred.mismatched + 0.3) and measured["means_cosine"] >= 0.8:
        return PREPROCESSING
    return MIXED


def _norms(x: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " N"]:
    return np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64))


def _cosines(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " N"]:
    """Row by row; that of two rows of zeros is 1, of one 0."""
    inner, x_norms, y_norms = np.einsum("nd,nd->n", x, y, dtype=np.float64), _norms(x), _norms(y)
    scale = x_norms * y_norms
    return np.where(scale > 0, inner / np.where(scale > 0, scale, 1), (x_norms == y_norms) * 1.0)


def _summary(by_clip: np.ndarray, x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "N D"]) -> Cosines:
    """`by_clip` are the cosines of the rows; mismatched ones are half a set apart, as neighbours may be alike."""
    mismatched = float(_cosines(x, np.roll(y, len(y) // 2, axis=0)).mean()) if len(x) > 1 else math.nan
    low, least = float(np.percentile(by_clip, 5)), float(by_clip.min())
    return Cosines(mean=float(by_clip.mean()), low=low, least=least, mismatched=mismatched)


def _moments(x: Float[np.ndarray, "N D"], norms: Float[np.ndarray, " N"]) -> Moments:
    mean, std = float(x.mean(dtype=np.float64)), float(x.std(dtype=np.float64))
    return Moments(mean=mean, std=std, norm=float(norms.mean()))


def _apart(one: float, other: float) -> float:
    """The relative difference of two sizes."""
    return abs(one - other) / max(one, other) if max(one, other) else 0.0


def _same_encoder(modality: Modality) -> str:
    one, other = modality.fingerprints
    return "not known" if None in (one, other) else "the same" if one == other else f"{one} / {other}"


def _cell(value: Any, format: str = ".4f") -> str:
    values = value if isinstance(value, tuple) else (value,)
    return " / ".join("-" if v is None or v != v else f"{v:{format}}" for v in values)


_of = lambda value, field: None if value is None else getattr(value, field)
_ROWS = (
    ("verdict", lambda m: m.verdict),
    ("encoders", _same_encoder),
    ("clips in common / only A / only B", lambda m: _cell((m.common, m.only_a, m.only_b), ",")),
    ("size A / B", lambda m: _cell(m.sizes, "d")),
    ("mean A / B", lambda m: _cell((_of(m.a, "mean"), _of(m.b, "mean")))),
    ("standard deviation A / B", lambda m: _cell((_of(m.a, "std"), _of(m.b, "std")))),
    ("norm A / B", lambda m: _cell((_of(m.a, "norm"), _of(m.b, "norm")), ".3f")),
    ("relative difference", lambda m: _cell(m.difference, ".2e")),
    ("cosine: mean / 5 % / least", lambda m: _cell(tuple(_of(m.cosine, f) for f in ("mean", "low", "least")), ".5f")),
    ("  of mismatched clips", lambda m: _cell(_of(m.cosine, "mismatched"), ".5f")),
    ("centred: mean / 5 % / least", lambda m: _cell(tuple(_of(m.centred, f) for f in ("mean", "low", "least")), ".5f")),
    ("  of mismatched clips", lambda m: _cell(_of(m.centred, "mismatched"), ".5f")),
    ("means: cosine / distance", lambda m: _cell((m.means_cosine, m.means_distance))),
)


def _some(names: list[str]) -> str:
    return ", ".join(names[:WORST]) + (", ..." if len(names) > WORST else "")


def _plain(value: Any) -> Any:
    """In JSON's types."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
