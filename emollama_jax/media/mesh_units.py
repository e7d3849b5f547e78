"""Blendshapes of a clip's main face, as a table of the form of `media/action_units.py`.

They are no action units and keep their own names. Of the 52, USABLE follow a face in real clips, and each stands for
what is seen alone: `mouthSmile` rises in a smile and in a grimace of pain alike. Faces differ at rest, so that a value
counts as far as it is above the clip's own baseline.

Axes: F frames, U units, B blendshapes.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emollama_jax.errors import UserError, first_line
from emollama_jax.media.action_units import ActionUnits
from emollama_jax.media.clip import ClipConfig
from emollama_jax.media.face_mesh import BLENDSHAPES, CROP, SEEN, load_mesh
from emollama_jax.media.faces import face_crops
from emollama_jax.media.images import even_indices
from emollama_jax.media.peak import motion_peak
from emollama_jax.media.video import Video

VERSION = 1  # counted up when the same clip would give other values
USABLE = (
    "browInnerUp",
    "browOuterUpLeft",
    "browOuterUpRight",
    "jawOpen",
    "mouthSmileLeft",
    "mouthSmileRight",
    "mouthUpperUpLeft",
    "mouthUpperUpRight",
)
LIDS, SHUT = ("eyeBlinkLeft", "eyeBlinkRight"), 0.5
BASELINE = 20  # percentile: a face is at rest, or near it, in a fifth of its frames
FEWEST = 8  # frames with a face; fewer, as of a still, have no baseline


def measure_blendshapes(video: Path, config: ClipConfig) -> dict[str, Any] | UserError:
    """Measures a clip, in a child process. Needs `config.mesh`.

    Returns:
        `csv`: the table, which `read_action_units` reads; `peak_index`: the frame in which the face is moved most, of
        those with a face that does not blink, or None where no face is found.
    """
    try:
        mesh = load_mesh(config.mesh)
        with Video(video) as opened:
            numbers = even_indices(opened.num_frames, min(config.max_faces, opened.num_frames))
            crops = face_crops(opened, numbers, mesh=mesh, person=config.person)
            times = opened.times[crops.indices]
        presence, values = np.zeros(len(times)), np.zeros((len(times), len(BLENDSHAPES)))
        for i, crop in enumerate(crops.crops):
            found = mesh.mesh(np.asarray(Image.fromarray(crop).resize((CROP, CROP), Image.Resampling.BICUBIC)))
            presence[i], values[i] = found.presence * crops.found[i], mesh.blendshapes(found)
    except UserError as error:
        return error
    except Exception as error:  # of a decoder, on a file that nobody has thought of
        return UserError(f"{video}: cannot be read ({type(error).__name__}: {first_line(error)}); leave it out")
    rows = (
        ",".join([str(number), f"{time:.3f}", *(f"{value:.4f}" for value in row)])
        for number, time, row in zip(crops.indices, times, np.column_stack([presence, values]), strict=True)
    )
    csv = "\n".join([",".join(["frame", "timestamp", "presence", *BLENDSHAPES]), *rows]) + "\n"
    seen = presence >= SEEN
    awake = seen & (values[:, [BLENDSHAPES.index(name) for name in LIDS]].mean(axis=1) < SHUT)
    usable = awake if awake.any() else seen
    return {"csv": csv, "peak_index": motion_peak(crops, usable) if usable.any() else None}


def above_baseline(table: ActionUnits) -> ActionUnits:
    """Returns the usable blendshapes alone, as far as they are above the clip's baseline, where it has one."""
    places = [table.units.index(name) for name in USABLE]
    values = table.intensity[:, places]
    if table.found.sum() >= FEWEST:
        values = np.maximum(values - np.percentile(values[table.found], BASELINE, axis=0), 0)
    return dataclasses.replace(table, units=USABLE, intensity=values, present=table.present[:, places])
