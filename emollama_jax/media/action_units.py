"""The action units of a clip's main face, out of the files of the tools that measure them.

    openface2   frame, success, AU01_r ... AU45_r (0 to 5), AU01_c ... AU45_c; AU28 has no AU28_r
    openface3   au: a text with a list of eight numbers without names; OPENFACE3_UNITS are those it is trained on
    libreface   frame_idx, au_1 ... (0 or 1), au_1_intensity ... (0 to 5)
    blendshapes frame, presence (of a face, 0 to 1), browDownLeft ... (0 to 1): `media/mesh_units.py`, under their own
                names

Headers may have blanks before them and be in any case. Values of two tools cannot be compared: a table says whose they
are.

Axes: F frames, U units.
"""

import csv
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from emollama_jax.errors import UserError
from emollama_jax.media.face_mesh import BLENDSHAPES, SEEN

# DISFA's eight, in the order of OpenFace 3's list. A file that says otherwise does not exist: the list has no names.
OPENFACE3_UNITS = ("AU01", "AU02", "AU04", "AU06", "AU09", "AU12", "AU25", "AU26")
ACTIVE = 0.3  # the intensity from which a unit is active, as low as in MERR, where 0.36 counts
BLINKS = {"AU45": 1.0, "eyeBlinkLeft": 0.5, "eyeBlinkRight": 0.5}  # from which intensity eyes are shut
LONGEST_BLINK_S = 0.5  # eyes that are shut for longer do not blink
USUAL_FRAME_S = 1 / 25  # where a file has no times

_COLUMNS = {
    "frame": ("frame", "frame_idx", "frame_index", "frame_number"),
    "time": ("timestamp", "time"),
    "success": ("success",),
    "confidence": ("confidence",),
    "face": ("face_id",),
    "list": ("au", "aus", "action_units"),
    "presence": ("presence",),
}
_OPENFACE2 = re.compile(r"au(\d\d)_([rc])")
_LIBREFACE = re.compile(r"au_(\d{1,2})(_intensity)?")


class UnitRow(NamedTuple):
    """One unit in one frame."""

    frame: int
    unit: str
    intensity: float
    """NaN where the tool does not measure it."""
    present: float
    """0 or 1; NaN where the tool does not say."""
    source: str


@dataclass(frozen=True)
class ActionUnits:
    """The action units of one face through a clip."""

    source: str
    """The tool: openface2, openface3, libreface or blendshapes."""
    units: tuple[str, ...]
    """AU01, AU02, ... in ascending order; of blendshapes their own names."""
    frames: Int[np.ndarray, " F"]
    """The number of each frame in the clip, from 0, ascending."""
    times: Float[np.ndarray, " F"]
    """In seconds."""
    found: Bool[np.ndarray, " F"]
    """Whether the tool found the face there. The values of other frames mean nothing."""
    intensity: Float[np.ndarray, "F U"]
    """NaN where the tool does not measure it."""
    present: Float[np.ndarray, "F U"]
    """0 or 1; NaN where the tool does not say."""

    def rows(self) -> Iterator[UnitRow]:
        """Yields the table in its long form, frame by frame, without frames that failed."""
        for i in np.flatnonzero(self.found):
            for k, unit in enumerate(self.units):
                yield UnitRow(
                    int(self.frames[i]), unit, float(self.intensity[i, k]), float(self.present[i, k]), self.source
                )

    def active(self, least: float = ACTIVE) -> Bool[np.ndarray, "F U"]:
        """Returns which units are active: by their intensity, or by their presence where only that is known."""
        measured = ~np.isnan(self.intensity)
        return self.found[:, None] & np.where(measured, self.intensity >= least, self.present == 1)

    def active_at(self, frame: int, least: float = ACTIVE) -> dict[str, float]:
        """Returns the active units of a frame with their intensity, in order; 1 for presence without one."""
        rows = np.flatnonzero(self.frames == frame)
        if not len(rows):
            return {}
        active, values = self.active(least)[rows[0]], np.nan_to_num(self.intensity[rows[0]], nan=1.0)
        return {unit: float(values[k]) for k, unit in enumerate(self.units) if active[k]}

    def blinks(self) -> Bool[np.ndarray, " F"]:
        """Returns in which frames the eyes blink, that is, are shut for LONGEST_BLINK_S at most."""
        blinks = np.zeros(len(self.frames), bool)
        lids = [self.active(least)[:, self.units.index(unit)] for unit, least in BLINKS.items() if unit in self.units]
        if not lids:
            return blinks
        shut = np.all(lids, axis=0)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], shut.astype(int), [0]])))
        for start, end in edges.reshape(-1, 2):
            blinks[start:end] = self.times[end - 1] - self.times[start] <= LONGEST_BLINK_S
        return blinks

    def candidates(self) -> Bool[np.ndarray, " F"]:
        """Returns which frames can be the peak: those with a face that does not blink, or any face if all blink."""
        awake = self.found & ~self.blinks()
        return awake if awake.any() else self.found


def read_action_units(path: str | Path, *, person: int = 1) -> ActionUnits:
    """Reads a file of OpenFace 2.2, OpenFace 3, LibreFace or blendshapes.

    Args:
        person: of a file with several faces: 1 is the one found in most frames, of equals the surest, 2 the next.

    Raises:
        UserError: no such file, of no tool above, a row that is not numbers, or fewer faces than `person`.
    """
    path = Path(path)
    names, table = _read_table(path)
    columns = {kind: next((names.index(n) for n in known if n in names), None) for kind, known in _COLUMNS.items()}
    source, units, places = _units_of(names, columns)
    if not source:
        raise UserError(
            f"{path}: has no columns frame and AU01_r, AU02_r, ... (OpenFace 2), au (OpenFace 3) or au_1_intensity "
            "(LibreFace); run OpenFace with -aus"
        )
    measured: dict[str, list[_Measured]] = {}
    for number, row in enumerate(table):
        try:
            one = _measure(row, number, columns, places, len(units))
        except (ValueError, IndexError, OverflowError) as error:
            raise UserError(f"{path}, line {number + 2}: not a row of numbers; run OpenFace again") from error
        measured.setdefault(one.face, []).append(one)
    faces = {name: rows for name, rows in measured.items() if any(row.found for row in rows)}
    if not faces:
        raise UserError(f"{path}: no frame with a face; leave it out")
    if person > len(faces):
        raise UserError(f"{path}: no person {person}; it has {len(faces)} faces; give a smaller number")
    first = min(row.frame for rows in measured.values() for row in rows)
    start = min(first, 1) if source == "openface2" else min(first, 0)  # OpenFace 2 counts from 1
    return _table(source, units, sorted(faces.values(), key=_weight, reverse=True)[person - 1], start)


class _Measured(NamedTuple):
    face: str
    frame: int
    time: float
    confidence: float
    found: bool
    intensity: list[float]
    present: list[float]


class _Places(NamedTuple):
    """Where each unit's values stand in a row, None where they are not there; of a list in one cell, its place."""

    intensity: list[int | None]
    present: list[int | None]
    list_at: int | None


def _read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, skipinitialspace=True)
            names = [name.strip().lower() for name in next(reader, [])]
            return names, [row for row in reader if row]
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}; check the path") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV; run OpenFace again or leave it out") from error


def _units_of(names: Sequence[str], columns: dict[str, int | None]) -> tuple[str, tuple[str, ...], _Places]:
    """The tool ("" if none), its units, and where their values stand."""
    for source, pattern, is_intensity in (
        ("openface2", _OPENFACE2, lambda kind: kind == "r"),
        ("libreface", _LIBREFACE, bool),
    ):
        found: dict[str, dict[bool, int]] = {}
        for place, name in enumerate(names):
            if match := pattern.fullmatch(name):
                found.setdefault(f"AU{int(match[1]):02d}", {})[is_intensity(match[2])] = place
        if any(True in places for places in found.values()) and columns["frame"] is not None:
            units = tuple(sorted(found))
            places = _Places([found[u].get(True) for u in units], [found[u].get(False) for u in units], None)
            return source, units, places
    shapes = {name: names.index(name.lower()) for name in BLENDSHAPES if name.lower() in names}
    if len(shapes) == len(BLENDSHAPES) and columns["presence"] is not None:
        return "blendshapes", tuple(shapes), _Places([*shapes.values()], [None] * len(shapes), None)
    if columns["list"] is not None:
        return "openface3", OPENFACE3_UNITS, _Places([], [], columns["list"])
    return "", (), _Places([], [], None)


def _measure(row: list[str], number: int, columns: dict[str, int | None], places: _Places, num_units: int) -> _Measured:
    """What a row says. Raises ValueError, IndexError or OverflowError where it is no row of numbers."""
    value = lambda name, default: default if (place := columns[name]) is None else _float(row[place])
    if places.list_at is None:
        intensity = [math.nan if place is None else _float(row[place]) for place in places.intensity]
        present = [math.nan if place is None else _float(row[place]) for place in places.present]
        measured = [v for v, place in zip(intensity, places.intensity, strict=True) if place is not None]
    else:
        cell = row[places.list_at].strip()
        measured = intensity = (
            [float(v) for v in re.split(r"[\s,]+", cell.strip("[]() "))] if cell.strip("[]() ") else []
        )
        if intensity and len(intensity) != num_units:
            raise ValueError(f"{len(intensity)} units")
        intensity, present = intensity or [math.nan] * num_units, [math.nan] * num_units
    frame = int(value("frame", float(number)))
    return _Measured(
        face="" if columns["face"] is None else row[columns["face"]].strip(),
        frame=frame,
        time=value("time", frame * USUAL_FRAME_S),
        confidence=value("confidence", 1.0),
        found=min(value("success", 1.0), value("presence", 1.0)) >= SEEN
        and bool(measured)
        and all(map(math.isfinite, measured)),
        intensity=intensity,
        present=present,
    )


def _float(cell: str) -> float:
    return float(cell) if cell.strip() else math.nan


def _weight(rows: Sequence[_Measured]) -> tuple[int, float]:
    return sum(row.found for row in rows), math.fsum(row.confidence for row in rows if row.found)


def _table(source: str, units: tuple[str, ...], rows: Sequence[_Measured], start: int) -> ActionUnits:
    one_each = {row.frame: row for row in sorted(rows, key=lambda row: (row.frame, row.found))}  # a found one stays
    rows = list(one_each.values())
    return ActionUnits(
        source=source,
        units=units,
        frames=np.array([row.frame - start for row in rows]),
        times=np.array([row.time for row in rows], np.float64),
        found=np.array([row.found for row in rows]),
        intensity=np.array([row.intensity for row in rows], np.float64).reshape(len(rows), len(units)),
        present=np.array([row.present for row in rows], np.float64).reshape(len(rows), len(units)),
    )
