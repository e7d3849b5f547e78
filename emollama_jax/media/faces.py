"""The main face of a clip, cut out upright, in one size, for the MAE.

The faces of all frames are linked to tracks; the track that is largest and surest over the clip is the main face,
after which others are counted. With a mesh (`face_mesh`) the presence of a face decides, too, and whether it moves.
Each of its frames is turned, scaled and shifted so that the landmarks come to lie on TEMPLATE, by a movement that is
smoothed over time. A clip without any face gives the middles of its frames instead.

Axes: H x W pixels, S pixels of a crop, n frames that are looked at, F crops.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Complex, Float, Inexact, Int, UInt8
from PIL import Image

from emollama_jax.errors import UserError
from emollama_jax.media.face_detection import MIN_SCORE, Faces, can_detect, detect_faces
from emollama_jax.media.face_mesh import CROP, FaceMesh, Mesh
from emollama_jax.media.video import Video

# x, y in parts of a crop's side: the eyes, the nose's tip and the mouth's corners. An upright face of the usual
# proportions has its hairline at 0.08 and its chin at 0.9, which leaves an open mouth its room.
TEMPLATE = np.array([(0.365, 0.38), (0.635, 0.38), (0.5, 0.534), (0.39, 0.69), (0.61, 0.69)])
SURE_SCORE = 0.8  # a track that is never so sure is no face
PRESENT = 0.3  # nor is one whose mean presence is below that
MOVING = (
    0.006  # of a mesh's size, that its points move on average; people's move by 0.02 and more, a picture's by 0.002
)
FEWEST = 4  # meshes that tell whether a face moves
MAX_SHIFT = 0.7  # of a face from one frame to the next, in sides of its box
MAX_GROWTH = 1.7  # of this side, either way
MAX_GAP_S = 0.5  # a face that is not found for longer is another one
MESHES = 12  # of a track's frames, about, in which it is asked whether there is a face
CUT = 30.0  # mean difference of small pictures, of 255; a head that moves for half a second stays below
SMOOTHING_S = 0.1  # standard deviation, of where a face is and how it is turned
SIZE_SMOOTHING_S = 0.5  # a head comes nearer slowly, while what is measured of it changes with every word


@dataclass(frozen=True)
class FaceCrops:
    """The crops of a clip, in order."""

    crops: UInt8[np.ndarray, "F S S 3"]
    indices: Int[np.ndarray, " F"]
    """The number of each crop's frame in the clip."""
    boxes: Float[np.ndarray, "F 4"]
    """x, y, width, height in the frame's pixels, of the face, or of the crop where there is none."""
    found: Bool[np.ndarray, " F"]
    """False: no face was found there; the crop is interpolated or the frame's middle."""
    source: str
    """face; centre: the middle of the frames, no face is in the clip; undetected: also this, there is no detector."""
    looked_for: int
    """In so many frames."""


@dataclass(frozen=True)
class Track:
    """One face through a clip, without gaps that are longer than MAX_GAP_S; numbers count the frames looked at."""

    frames: Int[np.ndarray, " F"]
    boxes: Float[np.ndarray, "F 4"]
    landmarks: Float[np.ndarray, "F 5 2"]
    scores: Float[np.ndarray, " F"]
    """0 where the face was not found and is interpolated."""


def main_face_rule(*, mesh: bool, person: int) -> str:
    """Returns a name of the rule by which `main_track` chooses, which features depend on."""
    rule = f"area*(score-{MIN_SCORE})" + ("*presence, moving" if mesh else "")
    return rule if person == 1 else f"{rule}, person {person}"


def face_crops(
    video: Video, indices: Sequence[int], *, size: int = 224, mesh: FaceMesh | None = None, person: int = 1
) -> FaceCrops:
    """The main face in the frames of these numbers, which ascend. The frames are read twice, and never kept.

    A frame in which the main face is not to be seen gives no crop, so that there may be fewer crops than indices.

    Args:
        mesh: tells faces from what is none and people from pictures, and finds faces where there is no detector.
        person: 1 is the main face, 2 the next, and so on.

    Raises:
        UserError: no indices, the video cannot be read, or there are faces in it, but fewer than `person`.
    """
    indices = np.asarray(indices)
    if not len(indices):
        raise UserError("faces: no frames to look at; leave the clip out")
    detects = can_detect() or mesh is not None
    looked_for, source = len(indices), "centre" if detects else "undetected"
    track = _find_track(video, indices, mesh, person) if detects else None
    if track is None:
        boxes, crops = [], []
        for pixels in video.frames(indices.tolist()):
            boxes.append(centre_square(*pixels.shape[:2]))
            crops.append(_cut_centre(pixels, size))
        return FaceCrops(np.stack(crops), indices, np.stack(boxes), np.zeros(looked_for, bool), source, looked_for)
    indices = indices[track.frames]
    movement = steady(similarity(track.landmarks), video.times[indices])
    frames = zip(video.frames(indices.tolist()), movement, strict=True)
    crops = np.stack([cut_out(pixels, moved, size) for pixels, moved in frames])
    return FaceCrops(crops, indices, track.boxes, track.scores > 0, "face", looked_for)


def _find_track(video: Video, indices: Int[np.ndarray, " n"], mesh: FaceMesh | None, person: int) -> Track | None:
    faces, thumbnails, meshes = [], [], {}
    for i, pixels in enumerate(video.frames(indices.tolist())):
        found = detect_faces(pixels) if can_detect() else Faces(*mesh.detect(pixels))
        faces.append(found)
        thumbnails.append(thumbnail(pixels))
        if mesh is not None and len(found.scores) and i % max(1, len(indices) // MESHES) == 0:
            meshes[i] = [mesh.mesh(cut_out(pixels, place, CROP)) for place in similarity(found.landmarks)]
    return main_track(faces, video.times[indices], cuts(np.stack(thumbnails)), meshes, person)


# The main face


def thumbnail(pixels: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "16 16 3"]:
    """A picture small enough to keep, in which cuts still show."""
    return np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BOX), np.float32)


def cuts(thumbnails: Float[np.ndarray, "n 16 16 3"]) -> Bool[np.ndarray, " n"]:
    """Whether a new shot begins with a frame."""
    change = np.abs(np.diff(thumbnails, axis=0)).mean(axis=(1, 2, 3))
    return np.concatenate([[False], change > CUT])


def main_track(
    faces: Sequence[Faces],
    times: Float[np.ndarray, " n"],
    cuts: Bool[np.ndarray, " n"],
    meshes: Mapping[int, Sequence[Mesh]] | None = None,
    person: int = 1,
) -> Track | None:
    """The face with the largest sum of `face_weights` over the frames; of equals, the one that comes first.

    Args:
        faces: of each frame.
        times: of each frame, in seconds.
        cuts: whether a new shot begins with it; no track goes on then.
        meshes: of each face in some of the frames. A track's weight is multiplied by their mean presence; where that is
            below PRESENT there is no face. A face that does not move, as of a picture on the wall, comes after all that
            do.
        person: 1 is that face, 2 the one with the next sum, and so on.

    Returns:
        The track, or None where there is no face.

    Raises:
        UserError: there are faces, but fewer than `person`.
    """
    weights = [face_weights(of_frame) for of_frame in faces]
    ranked = []
    for track in _link(faces, times, cuts):
        seen = [meshes[i][k] for i, k in track if meshes and i in meshes]
        present = float(np.mean([one.presence for one in seen])) if seen else 1.0
        if max(faces[i].scores[k] for i, k in track) >= SURE_SCORE and present >= PRESENT:
            ranked.append((_moves(seen), present * sum(float(weights[i][k]) for i, k in track), track))
    if not ranked:
        return None
    if person > len(ranked):
        raise UserError(f"no person {person} among the {len(ranked)} faces of the clip; give a smaller number")
    ranked.sort(key=lambda one: (not one[0], -one[1]))
    best = ranked[person - 1][2]
    known = np.array([i for i, _ in best])
    frames = np.arange(known[0], known[-1] + 1)
    rows = np.array([np.concatenate([faces[i].boxes[k], faces[i].landmarks[k].ravel()]) for i, k in best])
    filled = np.stack([np.interp(times[frames], times[known], column) for column in rows.T], axis=1)
    scores = np.zeros(len(frames))
    scores[known - known[0]] = [faces[i].scores[k] for i, k in best]
    return Track(frames, filled[:, :4], filled[:, 4:].reshape(-1, 5, 2), scores)


def _moves(seen: Sequence[Mesh]) -> bool:
    """Whether a face changes; one of which too little is known does."""
    if len(seen) < FEWEST:
        return True
    points = np.stack([one.points for one in seen])
    points = points - points.mean(axis=1, keepdims=True)
    points /= np.sqrt(np.square(points).mean(axis=(1, 2), keepdims=True))
    return bool(points.std(axis=0).mean() >= MOVING)


def face_weights(faces: Faces) -> Float[np.ndarray, " N"]:
    """How much each face of a frame counts: its area times what its score is above the least, which ears and necks of
    people seen from behind hardly are, however large."""
    return faces.boxes[:, 2] * faces.boxes[:, 3] * (faces.scores - MIN_SCORE)


def _link(faces: Sequence[Faces], times: np.ndarray, cuts: np.ndarray) -> list[list[tuple[int, int]]]:
    """Tracks, as (frame, face in it). The nearest are linked first."""
    tracks: list[list[tuple[int, int]]] = []
    going_on: list[list[tuple[int, int]]] = []
    for i, now in enumerate(faces):
        if cuts[i]:
            going_on = []
        # Frames that lie farther apart than that can still be neighbours.
        going_on = [t for t in going_on if t[-1][0] == i - 1 or times[i] - times[t[-1][0]] <= MAX_GAP_S]
        pairs = sorted(
            (distance, a, k)
            for a, track in enumerate(going_on)
            for k in range(len(now.boxes))
            if (distance := _distance(faces[track[-1][0]].boxes[track[-1][1]], now.boxes[k])) <= MAX_SHIFT
        )
        linked_tracks, linked_faces = set(), set()
        for _, a, k in pairs:
            if a not in linked_tracks and k not in linked_faces:
                going_on[a].append((i, k))
                linked_tracks.add(a)
                linked_faces.add(k)
        new = [[(i, k)] for k in range(len(now.boxes)) if k not in linked_faces]
        tracks += new
        going_on += new
    return tracks


def _distance(a: Float[np.ndarray, " 4"], b: Float[np.ndarray, " 4"]) -> float:
    """Between the middles of two boxes, in sides; infinite where their sizes are no one's."""
    side_a, side_b = np.sqrt(a[2] * a[3]), np.sqrt(b[2] * b[3])
    if not 1 / MAX_GROWTH <= side_a / side_b <= MAX_GROWTH:
        return np.inf
    return float(np.hypot(*(a[:2] + a[2:] / 2 - b[:2] - b[2:] / 2)) / np.sqrt(side_a * side_b))


# Crops


def similarity(landmarks: Float[np.ndarray, "F 5 2"]) -> Complex[np.ndarray, "F 2"]:
    """The movement of TEMPLATE that brings it nearest to the landmarks, in the sense of least squares.

    Points are complex numbers x + iy. A point p of the template goes to `to + turn * (p - middle)`, where `middle` is
    the template's; [F, 2] holds (to, turn), the latter in pixels a side.
    """
    points, template = landmarks @ [1, 1j], TEMPLATE @ [1, 1j]
    to, template = points.mean(axis=1), template - template.mean()
    return np.stack([to, points @ template.conj() / np.sum(np.abs(template) ** 2)], axis=1)


def steady(movement: Complex[np.ndarray, "F 2"], times: Float[np.ndarray, " F"]) -> Complex[np.ndarray, "F 2"]:
    """The movement, smoothed over time, its size more than the rest."""
    smoothed = smooth(movement, times, SMOOTHING_S)
    size = smooth(np.abs(movement[:, 1:]), times, SIZE_SMOOTHING_S)[:, 0]
    smoothed[:, 1] *= size / np.maximum(np.abs(smoothed[:, 1]), 1e-9)
    return smoothed


def smooth(
    values: Inexact[np.ndarray, "F c"], times: Float[np.ndarray, " F"], width: float
) -> Inexact[np.ndarray, "F c"]:
    """Local straight lines under a Gaussian of so many seconds: what moves evenly stays as it is, also at the ends."""
    result = values.copy()
    for i, time in enumerate(times):
        near = np.flatnonzero(np.abs(times - time) <= 3 * width)
        since = times[near] - time
        weights = np.exp(-0.5 * (since / width) ** 2)
        weights /= weights.sum()
        middle = weights @ since
        spread = weights @ (since - middle) ** 2
        tilt = middle / spread if spread > 1e-12 else 0.0
        result[i] = (weights * (1 - tilt * (since - middle))) @ values[near]
    return result


def cut_out(
    pixels: UInt8[np.ndarray, "H W 3"], movement: Complex[np.ndarray, " 2"], size: int
) -> UInt8[np.ndarray, "S S 3"]:
    """The square that `movement` makes of the template's, as size x size pixels. Beyond the frame it is black."""
    to, turn = movement
    image = Image.fromarray(pixels)
    if (shrink := size / max(abs(turn), 1.0)) < 1:  # first, by a filter that takes in every pixel
        smaller = [max(1, round(side * shrink)) for side in image.size]
        image = image.resize(smaller, Image.Resampling.BICUBIC, reducing_gap=3)
    scale_x, scale_y = image.width / pixels.shape[1], image.height / pixels.shape[0]
    corner = to - turn * (TEMPLATE @ [1, 1j]).mean()
    a, b = turn.real / size, turn.imag / size
    matrix = (a * scale_x, -b * scale_x, corner.real * scale_x, b * scale_y, a * scale_y, corner.imag * scale_y)
    return np.array(image.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC))


def centre_square(height: int, width: int) -> Float[np.ndarray, " 4"]:
    """The largest square in the middle of a frame: x, y, width, height."""
    side = min(height, width)
    return np.array([(width - side) // 2, (height - side) // 2, side, side], np.float64)


def _cut_centre(pixels: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "S S 3"]:
    left, top, side, _ = centre_square(*pixels.shape[:2])
    box = (left, top, left + side, top + side)
    return np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, box=box))
