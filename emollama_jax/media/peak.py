"""The frame in which a face shows most: from action units where OpenFace has measured them, else from the face's crops.

Axes: S pixels of a crop, I = SIDE, F crops, P pixels of a face, n values.
"""

import csv
import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from emollama_jax.errors import UserError
from emollama_jax.media.faces import FaceCrops

SIDE = 56  # pixels of a crop in which faces are compared
BLUR = 1.5  # of these: a brow or lip that moves on must still overlap with itself, or all movements look equal
FACE = (0.34, 0.42)  # half-axes of the ellipse that is compared, in sides of a crop; hair and background are outside
MOUTH = (slice(34, 48), slice(16, 40))  # rows and columns
MOUTH_WEIGHT = 3

_INTENSITY = re.compile(r"AU\d\d_r")


def motion_peak(faces: FaceCrops) -> int:
    """The number of the frame in which the face is moved most.

    An expression comes and goes: at its peak the face is least like what it is far from then, while a face at rest
    looks as it does at other times. So a frame scores its mean difference from the others, which count by the square
    of their distance in time. What moving, turning or growing the whole face, or other light, would explain is left
    out of the difference.

    That alone would take a short rest within a long smile for the peak. A mouth that is open, drawn or stretched has
    more and sharper edges than one at rest: their strength, to the power of MOUTH_WEIGHT, is the score's factor, where
    crops are aligned so that it is known where the mouth is.

    Interpolated crops are not looked at where a face was found in others.
    """
    looked_at = np.flatnonzero(faces.found if faces.found.any() else np.ones(len(faces.found), bool))
    numbers, gray = faces.indices[looked_at], _gray(faces.crops[looked_at])
    changes = _changes(gray)
    squares = np.sum(changes**2, axis=1)
    differences = np.sqrt(np.maximum(squares[:, None] + squares - 2 * changes @ changes.T, 0))
    far = np.square(numbers[:, None] - numbers).astype(np.float64)
    score = np.sum(far * differences, axis=1) / np.maximum(far.sum(axis=1), 1)
    if faces.source == "face":
        down, right = np.gradient(gray, axis=(1, 2))
        score *= np.hypot(down, right)[:, *MOUTH].mean(axis=(1, 2)) ** MOUTH_WEIGHT
    return int(numbers[_smooth(score, numbers).argmax()])


def _gray(crops: UInt8[np.ndarray, "F S S 3"]) -> Float[np.ndarray, "F I I"]:
    small = [Image.fromarray(crop).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX) for crop in crops]
    return np.stack(small).astype(np.float32)


def _changes(gray: Float[np.ndarray, "F I I"]) -> Float[np.ndarray, "F P"]:
    """How each face differs from the typical one, without what moving it or other light explains."""
    from scipy.ndimage import gaussian_filter

    gray = gaussian_filter(gray, (0, BLUR, BLUR))
    typical = np.median(gray, axis=0)
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    inside = (x / FACE[0]) ** 2 + (y / FACE[1]) ** 2 <= SIDE**2
    down, right = np.gradient(typical)
    explained = (right, down, x * right + y * down, x * down - y * right, np.ones_like(typical), typical)
    basis = np.linalg.svd(np.stack([image[inside] for image in explained], axis=1), full_matrices=False)
    basis = basis.U[:, basis.S > 1e-6 * basis.S[0]]
    changes = (gray - typical)[:, inside]
    return changes - changes @ basis @ basis.T


def openface_peak(path: str | Path) -> int:
    """The number, from 0, of the frame with the largest sum of action units' intensities in a CSV file of OpenFace.

    Only frames that OpenFace calls a success count, and of several faces the one with most of these (of equals, the
    surest). The sum is smoothed over the frames beside it.

    Raises:
        UserError: no such file, not a file of OpenFace's with intensities, or no success in it.
    """
    rows = _successes(Path(path))
    by_face = defaultdict(list)
    for face, frame, confidence, total in rows:
        by_face[face].append((frame, confidence, total))
    main = max(by_face.values(), key=lambda face: (len(face), sum(confidence for _, confidence, _ in face)))
    totals = {frame: total for frame, _, total in sorted(main)}
    numbers = np.array(list(totals))
    return int(numbers[_smooth(np.array(list(totals.values())), numbers).argmax()])


def _successes(path: Path) -> list[tuple[str, int, float, float]]:
    """(face, frame from 0, confidence, sum of intensities) of each row that is a success."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            names = [name.strip() for name in next(reader, [])]
            table = [row for row in reader if row]
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}; check the path") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV; run OpenFace again or leave it out") from error
    column = {name: place for place, name in enumerate(names)}
    intensities = [place for name, place in column.items() if _INTENSITY.fullmatch(name)]
    if "frame" not in column or not intensities:
        raise UserError(f"{path}: has no columns frame and AU01_r, AU02_r, ...; run OpenFace with -aus")
    rows, first = [], None
    for line, row in enumerate(table, start=2):
        value = lambda name, default, row=row: float(row[column[name]]) if name in column else default
        try:
            frame, success, confidence = value("frame", 0.0), value("success", 1.0), value("confidence", 1.0)
            face, total = value("face_id", 0.0), math.fsum(float(row[place]) for place in intensities)
            first = int(frame) if first is None else min(first, int(frame))
        except (ValueError, IndexError, OverflowError) as error:
            raise UserError(f"{path}, line {line}: not a row of numbers; run OpenFace again") from error
        if success >= 0.5 and math.isfinite(total):
            rows.append((str(face), int(frame), confidence, total))
    if not rows:
        raise UserError(f"{path}: no frame with a face; leave it out")
    start = min(first, 1)  # OpenFace counts from 1
    return [(face, frame - start, confidence, total) for face, frame, confidence, total in rows]


def _smooth(values: Float[np.ndarray, " n"], numbers: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The mean with the values beside it, which count half; at an end and beside a hole the value stands in for them.

    Beside means: no further than frames usually are from the next.
    """
    if len(values) < 2:
        return values
    near = np.diff(numbers) <= 1.5 * np.median(np.diff(numbers))
    before, after = values.copy(), values.copy()
    before[1:] = np.where(near, values[:-1], values[1:])
    after[:-1] = np.where(near, values[1:], values[:-1])
    return values / 2 + (before + after) / 4
