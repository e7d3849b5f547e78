"""What a picture shows, in words, by measurement: how many faces, where and how near, how bright and of which colour.

Axes: H x W pixels.
"""

import numpy as np
from jaxtyping import UInt8

from emollama_jax.media.face_detection import can_detect, detect_faces, detector_name
from emollama_jax.media.face_mesh import FaceMesh, mesh_identity

VERSION = 1  # counted up when the same picture would give other words
NUMBERS = ("no face", "one face", "two faces", "three faces", "four faces")
SURE = 0.8  # of a face's score


def picture_identity(bundle: str = "") -> str:
    """Returns what the words depend on beside the picture.

    Args:
        bundle: the file of the mesh.
    """
    detector = mesh_identity(bundle) if bundle and not can_detect() else detector_name()
    return f"measured {VERSION}, faces by {detector}"


def describe_picture(frame: UInt8[np.ndarray, "H W 3"], mesh: FaceMesh | None = None) -> str:
    """Describes a frame in a sentence. Who is seen, and in what setting, is not measured and not claimed.

    Args:
        mesh: finds faces where there is no detector.
    """
    light = _light(frame)
    if not can_detect() and mesh is None:
        return f"A {light} picture."
    found = detect_faces(frame) if can_detect() else mesh.detect(frame)
    faces = found.boxes[found.scores >= SURE]
    number = NUMBERS[len(faces)] if len(faces) < len(NUMBERS) else "many faces"
    if not len(faces):
        return f"A {light} picture in which no face is found."
    x, _, width, height = faces[np.argmax(faces[:, 2] * faces[:, 3])]
    middle = (x + width / 2) / frame.shape[1]
    side = "on the left" if middle < 0.4 else "on the right" if middle > 0.6 else "in the middle"
    tall = height / frame.shape[0]
    near = "close up" if tall > 0.45 else "from a little way off" if tall > 0.18 else "from far away"
    which = ", " if len(faces) == 1 else "; the largest is "
    return f"{number.capitalize()} in a {light} picture{which}{side}, seen {near}."


def _light(frame: UInt8[np.ndarray, "H W 3"]) -> str:
    red, green, blue = (float(v) for v in frame.reshape(-1, 3).mean(axis=0))
    bright = 0.299 * red + 0.587 * green + 0.114 * blue
    level = "dark" if bright < 70 else "bright" if bright > 165 else "moderately lit"
    if max(red, green, blue) - min(red, green, blue) < 4:
        return f"{level}, colourless"
    return f"{level}, warm" if red - blue > 18 else f"{level}, cool" if blue - red > 18 else level
