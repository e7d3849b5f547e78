"""The frame in which a face shows most: from action units where OpenFace has measured them, else from the face's crops.

Axes: S pixels of a crop, I = SIDE, F crops, P pixels of a face, n values.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from emollama_jax.media.action_units import BLINKS, ActionUnits, read_action_units
from emollama_jax.media.faces import FaceCrops

SIDE = 56  # pixels of a crop in which faces are compared
BLUR = 1.5  # of these: a brow or lip that moves on must still overlap with itself, or all movements look equal
FACE = (0.34, 0.42)  # half-axes of the ellipse that is compared, in sides of a crop; hair and background are outside
MOUTH = (slice(34, 48), slice(16, 40))  # rows and columns
MOUTH_WEIGHT = 3


def motion_peak(faces: FaceCrops, usable: Bool[np.ndarray, " F"] | None = None) -> int:
    """The number of the frame in which the face is moved most.

    An expression comes and goes: at its peak the face is least like what it is far from then, while a face at rest
    looks as it does at other times. So a frame scores its mean difference from the others, which count by the square
    of their distance in time. What moving, turning or growing the whole face, or other light, would explain is left
    out of the difference.

    That alone would take a short rest within a long smile for the peak. A mouth that is open, drawn or stretched has
    more and sharper edges than one at rest: their strength, to the power of MOUTH_WEIGHT, is the score's factor, where
    crops are aligned so that it is known where the mouth is.

    Interpolated crops are not looked at where a face was found in others.

    Args:
        usable: the crops that are looked at, where it is known more about them, as that the eyes blink.
    """
    if usable is None:
        usable = faces.found if faces.found.any() else np.ones(len(faces.found), bool)
    looked_at = np.flatnonzero(usable)
    numbers, gray = faces.indices[looked_at], _gray(faces.crops[looked_at])
    changes = _changes(gray)
    squares = np.sum(changes**2, axis=1)
    differences = np.sqrt(np.maximum(squares[:, None] + squares - 2 * changes @ changes.T, 0))
    far = np.square(numbers[:, None] - numbers).astype(np.float64)
    score = np.sum(far * differences, axis=1) / np.maximum(far.sum(axis=1), 1)
    if faces.source == "face":
        down, right = np.gradient(gray, axis=(1, 2))
        score *= np.hypot(down, right)[:, *MOUTH].mean(axis=(1, 2)) ** MOUTH_WEIGHT
    return int(numbers[smooth(score, numbers).argmax()])


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


def openface_peak(path: str | Path, person: int = 1) -> int:
    """The number, from 0, of the frame with the largest sum of action units' intensities in a file of OpenFace's.

    Of several faces the main one counts, or another `person` (see `read_action_units`).

    Raises:
        UserError: as in `read_action_units`.
    """
    return strongest_frame(read_action_units(path, person=person))


def strongest_frame(table: ActionUnits) -> int:
    """The number, from 0, of the frame with the largest sum of intensities, smoothed over the frames beside it.

    Frames in which the face is not found or blinks do not count.
    """
    frames = table.candidates()
    units = [place for place, unit in enumerate(table.units) if unit not in BLINKS]
    totals = np.nansum(table.intensity[frames][:, units], axis=1)
    return int(table.frames[frames][smooth(totals, table.frames[frames]).argmax()])


def smooth(values: Float[np.ndarray, " n"], numbers: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
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
