"""The mesh, the presence and the blendshapes of a face, by the three networks of MediaPipe's face landmarker.

`face_landmarker.task` holds them (`emollama fetch face-landmarker`); the package ai-edge-litert runs them (extra
`mesh`), without any network access. They find faces, too, where libfacedetection has no library, as on ARM: fewer of
those far away, as the whole picture is seen in 128 x 128 pixels.

Blendshapes are no action units, and keep their own names: see `media/mesh_units.py`.

Axes: H x W pixels, N faces, B blendshapes.
"""

import contextlib
import hashlib
import os
import threading
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from emollama_jax.errors import UserError

BUNDLE = "face_landmarker.task"
CROP = 256  # pixels of a face that the mesh is found in
SEEN = 0.5  # the presence from which there is a face
ROI_GROWTH = 1.5  # from the detector's box to the square that the mesh is found in
OVERLAP = 0.3  # of two boxes, as intersection over union, that are one face
FACES = 8  # of a picture, at most
FOREHEAD = 0.12  # of the mesh's height: what boxes show above it

_NETWORKS = ("face_detector", "face_landmarks_detector", "face_blendshapes")
_SIDES = {
    **dict.fromkeys(("browDown", "browOuterUp", "cheekSquint", "eyeBlink", "eyeLookDown", "eyeLookIn"), True),
    **dict.fromkeys(("eyeLookOut", "eyeLookUp", "eyeSquint", "eyeWide", "mouthDimple", "mouthFrown"), True),
    **dict.fromkeys(("mouthLowerDown", "mouthPress", "mouthSmile", "mouthStretch", "mouthUpperUp", "noseSneer"), True),
    **dict.fromkeys(("browInnerUp", "cheekPuff", "jawForward", "jawLeft", "jawOpen", "jawRight", "mouthClose"), False),
    **dict.fromkeys(("mouthFunnel", "mouthLeft", "mouthPucker", "mouthRight", "mouthRollLower"), False),
    **dict.fromkeys(("mouthRollUpper", "mouthShrugLower", "mouthShrugUpper"), False),
}
BLENDSHAPES: tuple[str, ...] = (
    "_neutral",
    *sorted(name + side for name, sided in _SIDES.items() for side in (("Left", "Right") if sided else ("",))),
)
"""All 52, in the network's order, which is that of their names."""

# The points of the mesh that the blendshapes are computed from, as ranges and single numbers.
_RANGES = (
    "0-1 4-8 10 13-14 17 21 33 37 39-40 46 52-55 58 61 63 65-67 70 78 80-82 84 87-88 91 93 95 103 105 107 109 127 "
    "132-133 136 144-146 148-150 152-155 157-163 168 172-173 176 178 181 185 191 195 197 234 246 249 251 263 267 "
    "269-270 276 282-285 288 291 293 295-297 300 308 310-312 314 317-318 321 323-324 332 334 336 338 356 361-362 365 "
    "373-375 377-382 384-390 397-398 400 402 405 409 415 454 466 468-477"
)
_POINTS = np.array(
    [n for part in _RANGES.split() for n in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)]
)
_EYES = ((33, 133, 159, 145), (263, 362, 386, 374))  # corners and lids of the left one in the picture, and the right
_NOSE, _CORNERS = 1, (61, 291)


class Mesh(NamedTuple):
    """A face's mesh."""

    points: Float[np.ndarray, "478 2"]
    """x, y in pixels of the crop."""
    presence: float
    """0 to 1: whether there is a face in the crop."""


class Detections(NamedTuple):
    """Faces of a picture, in its pixels; as `face_detection.Faces`."""

    boxes: Float[np.ndarray, "N 4"]
    landmarks: Float[np.ndarray, "N 5 2"]
    scores: Float[np.ndarray, " N"]


class FaceMesh:
    """The three networks of a bundle. Threads may share it."""

    def __init__(self, bundle: Path):
        """Raises UserError where the bundle cannot be read, or ai-edge-litert is not installed."""
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise UserError(
                "a mesh of faces needs ai-edge-litert; pip install 'emollama_jax[mesh]', or do without"
            ) from error
        try:
            with zipfile.ZipFile(bundle) as files, _without_chatter():
                networks = [
                    Interpreter(model_content=files.read(f"{name}.tflite"), num_threads=1) for name in _NETWORKS
                ]
                for network in networks:
                    network.allocate_tensors()
        except FileNotFoundError as error:
            raise UserError(f"no {bundle}; emollama fetch face-landmarker brings it") from error
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{bundle}: not MediaPipe's face landmarker; emollama fetch face-landmarker") from error
        self._detector, self._landmarks, self._blendshapes = networks
        self._lock = threading.Lock()

    def mesh(self, crop: UInt8[np.ndarray, "256 256 3"]) -> Mesh:
        """Finds the mesh of an upright face, which fills the crop as `faces.TEMPLATE` says."""
        points, presence = self._run(self._landmarks, crop[None].astype(np.float32) / 255)[:2]
        return Mesh(points.reshape(-1, 3)[:, :2].astype(np.float64), float(_sigmoid(presence.item())))

    def blendshapes(self, mesh: Mesh) -> Float[np.ndarray, " B"]:
        """Computes the blendshapes of a mesh, each 0 to 1, in the order of BLENDSHAPES."""
        (values,) = self._run(self._blendshapes, mesh.points[None, _POINTS].astype(np.float32))
        return values.reshape(-1).astype(np.float64)

    def detect(self, pixels: UInt8[np.ndarray, "H W 3"]) -> Detections:
        """Finds the faces of a picture, the surest first. Their landmarks and boxes are those of their meshes."""
        height, width = pixels.shape[:2]
        side = max(height, width)
        square = Image.new("RGB", (side, side))
        square.paste(Image.fromarray(pixels), ((side - width) // 2, (side - height) // 2))
        small = np.asarray(square.resize((128, 128), Image.Resampling.BILINEAR, reducing_gap=2), np.float32)
        found = sorted(self._run(self._detector, small[None] / 127.5 - 1), key=lambda values: -values.shape[-1])
        places, scores = found[0][0].astype(np.float64), _sigmoid(found[1][0, :, 0].astype(np.float64))
        boxes, landmarks, kept = [], [], []
        for i in _distinct(places, scores):
            eyes = (places[i, 4:8] / 128 + np.tile(_anchors()[i], 2)).reshape(2, 2) * side
            middle = (places[i, :2] / 128 + _anchors()[i]) * side
            crop, points = self._on_picture(np.asarray(square), middle, eyes, places[i, 2] / 128 * side * ROI_GROWTH)
            if (mesh := self.mesh(crop)).presence < SEEN:
                continue
            points = points(mesh.points) - ((side - width) // 2, (side - height) // 2)
            low, high = points[:468].min(axis=0), points[:468].max(axis=0)
            low[1] -= FOREHEAD * (high[1] - low[1])
            boxes.append([*low, *(high - low)])
            landmarks.append([*(points[[*eye]].mean(axis=0) for eye in _EYES), points[_NOSE], *points[[*_CORNERS]]])
            kept.append(scores[i])
        return Detections(
            np.array(boxes, np.float64).reshape(-1, 4),
            np.array(landmarks, np.float64).reshape(-1, 5, 2),
            np.array(kept, np.float64),
        )

    def _on_picture(self, pixels, middle, eyes, side):
        """The square of this side around `middle`, with the eyes level, and the way back from it to the picture."""
        turn = complex(*(eyes[1] - eyes[0]))
        turn = turn / max(abs(turn), 1e-6) * side / CROP
        corner = complex(*middle) - turn * (CROP / 2) * (1 + 1j)
        matrix = (turn.real, -turn.imag, corner.real, turn.imag, turn.real, corner.imag)
        crop = Image.fromarray(pixels).transform((CROP, CROP), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)

        def back(points: Float[np.ndarray, "P 2"]) -> Float[np.ndarray, "P 2"]:
            moved = corner + turn * (points @ [1, 1j])
            return np.stack([moved.real, moved.imag], axis=1)

        return np.asarray(crop), back

    def _run(self, network, values: np.ndarray) -> list[np.ndarray]:
        with self._lock:
            network.set_tensor(network.get_input_details()[0]["index"], values.astype(np.float32))
            network.invoke()
            return [network.get_tensor(one["index"]) for one in network.get_output_details()]


def mesh_identity(bundle: str | Path) -> str:
    """Returns a name of a bundle's networks, the beginning of its hash. Raises UserError where it is not there."""
    try:
        return hashlib.sha256(Path(bundle).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"no {bundle} ({error.strerror}); emollama fetch face-landmarker brings it") from error


@lru_cache
def load_mesh(bundle: str | Path) -> FaceMesh:
    """Loads a bundle, once. Raises UserError as FaceMesh."""
    return FaceMesh(Path(bundle))


def _distinct(places: Float[np.ndarray, "A 16"], scores: Float[np.ndarray, " A"]) -> list[int]:
    """The surest of the detector's answers about each face."""
    chosen: list[int] = []
    for i in np.argsort(-scores)[: 16 * FACES]:
        if scores[i] < SEEN or len(chosen) == FACES:
            break
        if all(_overlap(places, int(i), k) < OVERLAP for k in chosen):
            chosen.append(int(i))
    return chosen


def _overlap(places: Float[np.ndarray, "A 16"], a: int, b: int) -> float:
    """The intersection over the union of two boxes."""
    middles, sizes = places[[a, b], :2] / 128 + _anchors()[[a, b]], places[[a, b], 2:4] / 128
    low, high = (middles - sizes / 2).max(axis=0), (middles + sizes / 2).min(axis=0)
    both = float(np.prod(np.maximum(high - low, 0)))
    return both / max(float(np.prod(sizes, axis=1).sum()) - both, 1e-9)


@lru_cache
def _anchors() -> Float[np.ndarray, "896 2"]:
    """Where the detector looks: twice on a grid of 16 x 16, six times on one of 8 x 8; in parts of the picture."""
    grids = []
    for cells, each in ((16, 2), (8, 6)):
        middles = (np.arange(cells) + 0.5) / cells
        x, y = np.meshgrid(middles, middles)
        grids.append(np.repeat(np.stack([x.ravel(), y.ravel()], axis=1), each, axis=0))
    return np.concatenate(grids)


def _sigmoid(values):
    return 1 / (1 + np.exp(-np.clip(values, -60, 60)))


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Keeps a line about delegates, which the library writes past Python, from the terminal."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
