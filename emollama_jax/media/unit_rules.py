"""The peak frame and the emotion of a clip by combinations of action units, as MERR was made.

An emotion is a set of units (`UnitRule`). In a frame that has enough of them active its rule matches; the frame with
the largest sum of the active units of a rule that matches is the peak. So a unit that is strong by itself, as in a jaw
that drops with a word, makes no peak, nor do blinks and frames in which the tool found no face.

Axes: F frames, U units.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emollama_jax.errors import UserError
from emollama_jax.io.json_files import read_json_object
from emollama_jax.media.action_units import ACTIVE, ActionUnits
from emollama_jax.media.face_mesh import BLENDSHAPES
from emollama_jax.media.peak import smooth


@dataclass(frozen=True, slots=True)
class UnitRule:
    """A combination of units that stands for an emotion."""

    label: str
    units: tuple[str, ...]
    at_least: int
    """How many of them must be active. A unit that the tool does not measure never is."""
    mean: float = 0.0
    """The least mean intensity of the active ones; presence without an intensity does not count in it."""


# The units of each emotion in MERR. About half of them are needed, of two both: AU20 alone, which is all that an
# intensity tells of `worried`, as OpenFace gives AU28 as presence only, comes with many words. AU25 alone does, too:
# a rule of one unit is a last resort (see `find_unit_peak`), and needs more.
MERR_RULES = (
    UnitRule("happy", ("AU06", "AU12", "AU14"), 2),
    UnitRule("sad", ("AU01", "AU04", "AU14", "AU15"), 2),
    UnitRule("surprise", ("AU01", "AU02", "AU05", "AU26"), 2),
    UnitRule("fear", ("AU01", "AU02", "AU04", "AU05", "AU07", "AU20", "AU26"), 4),
    UnitRule("angry", ("AU04", "AU05", "AU07", "AU10", "AU17", "AU23"), 3),
    UnitRule("contempt", ("AU10", "AU12", "AU14", "AU17"), 2),
    UnitRule("worried", ("AU20", "AU28"), 2),
    UnitRule("disgust", ("AU09", "AU15"), 2),
    UnitRule("doubt", ("AU25",), 1, mean=0.8),
)
# What usable blendshapes tell. All other labels need units that they do not show, and are not claimed.
BLENDSHAPE_RULES = (
    UnitRule("happy", ("mouthSmileLeft", "mouthSmileRight"), 2),
    UnitRule("surprise", ("browInnerUp", "browOuterUpLeft", "browOuterUpRight", "jawOpen"), 3),
)
RULES = MERR_RULES + BLENDSHAPE_RULES  # no tool measures units of both


@dataclass(frozen=True, slots=True)
class UnitPeak:
    """The peak of a clip by action units."""

    frame: int
    """From 0."""
    label: str
    """Of the rule that matches best there."""
    score: float
    """The sum of the active units of that rule."""
    active: dict[str, float]
    """All units that are active there, with their intensity; 1 for presence without one. In order."""
    matches: dict[str, float]
    """The labels of all rules that match there, the best first, with their strength."""


def find_unit_peak(
    table: ActionUnits,
    rules: Sequence[UnitRule] = RULES,
    *,
    active_from: float = ACTIVE,
    frame: int | None = None,
) -> UnitPeak | None:
    """Finds the peak and its emotion; None where no rule matches in any frame.

    Rules of one unit count only in a clip in which no rule of several matches. Of the rules that match at the peak the
    one is taken with the largest product of its active units' sum and of the share of its units that these are; of
    equals the first.

    Args:
        active_from: the intensity from which a unit is active.
        frame: the number of the peak, where it is known; the rules are then tried in this frame alone.
    """
    if frame is not None:
        at = table.frames == frame
        table = dataclasses.replace(
            table,
            frames=table.frames[at],
            times=table.times[at],
            found=table.found[at],
            intensity=table.intensity[at],
            present=table.present[at],
        )
    for some in ([rule for rule in rules if len(rule.units) > 1], [rule for rule in rules if len(rule.units) == 1]):
        if some and (peak := _find_peak(table, some, active_from)) is not None:
            return peak
    return None


def _find_peak(table: ActionUnits, rules: Sequence[UnitRule], active_from: float) -> UnitPeak | None:
    active = table.active(active_from)
    strength = np.where(active, np.nan_to_num(table.intensity), 0.0)
    place = {unit: k for k, unit in enumerate(table.units)}
    sums, shares = [], []
    for rule in rules:
        columns = [place[unit] for unit in rule.units if unit in place]
        count, total = active[:, columns].sum(axis=1), strength[:, columns].sum(axis=1)
        measured = (active & ~np.isnan(table.intensity))[:, columns].sum(axis=1)
        matches = table.candidates() & (count >= rule.at_least) & (total >= rule.mean * measured)
        sums.append(np.where(matches, np.maximum(total, 1e-6), 0.0))
        shares.append(count / len(rule.units))
    best = np.max(sums, axis=0)
    if not best.any():
        return None
    found = np.flatnonzero(table.found)
    smoothed = smooth(best[found], table.frames[found])
    at = int(found[np.where(best[found] > 0, smoothed, -1).argmax()])
    strengths = {
        r.label: float(s[at] * share[at]) for r, s, share in zip(rules, sums, shares, strict=True) if s[at] > 0
    }
    ranked = dict(sorted(strengths.items(), key=lambda item: -item[1]))
    label = next(iter(ranked))
    score = max(float(s[at]) for rule, s in zip(rules, sums, strict=True) if rule.label == label)
    frame = int(table.frames[at])
    return UnitPeak(frame, label, score, table.active_at(frame, active_from), ranked)


def labels_out_of_reach(table: ActionUnits, rules: Sequence[UnitRule] = RULES) -> list[str]:
    """Lists the labels whose rules can never match, as the tool does not measure enough of their units."""
    reach = {rule.label for rule in rules if len(set(rule.units) & set(table.units)) >= rule.at_least}
    return [label for label in dict.fromkeys(rule.label for rule in rules) if label not in reach]


def read_rules(path: str | Path) -> tuple[UnitRule, ...]:
    """Reads rules from JSON: {"rules": [{"label": "happy", "units": ["AU06", "AU12"], "mean": 0.5}, ...]}.

    `at_least` is half of the units, rounded up, where it is not given.

    Raises:
        UserError: no such file, or not of this form.
    """
    try:
        given = read_json_object(path)["rules"]
        rules = tuple(
            UnitRule(
                str(rule["label"]),
                tuple(map(_unit_name, rule["units"])),
                int(rule.get("at_least", -(-len(rule["units"]) // 2))),
                float(rule.get("mean", 0.0)),
            )
            for rule in given
        )
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); check the path") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f'{path}: not rules ({type(error).__name__}: {error}); write {{"rules": [{{"label": "happy", "units": '
            '["AU06", "AU12"], "at_least": 2}]}'
        ) from error
    if wrong := [rule.label for rule in rules if not rule.units or not 1 <= rule.at_least <= len(rule.units)]:
        raise UserError(f"{path}: the rule of {wrong[0]!r} needs 1 to all of its units (at_least); mend it")
    if not rules:
        raise UserError(f"{path}: holds no rule; give one or more")
    return rules


def _unit_name(unit: Any) -> str:
    return unit if unit in BLENDSHAPES else f"AU{int(str(unit).upper().removeprefix('AU')):02d}"


def rules_identity(rules: Sequence[UnitRule]) -> str:
    """Returns a text that is equal for equal rules."""
    return json.dumps([asdict(rule) for rule in rules], sort_keys=True)
