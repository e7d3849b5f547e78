"""Pictures of high dynamic range (PQ, HLG) as a player shows them on a usual screen, which is what encoders have seen.

Light is found by SMPTE ST 2084 or, for a screen of 1000 cd/m2, ITU-R BT.2100 (HLG), then brought into the range of a
screen whose white is 203 cd/m2 by the curve of ITU-R BT.2390, section 5.4.1, for red, green and blue each, so that what
is too bright loses its colour as on film. BT.2020's colours become BT.709's, and light becomes signal by BT.1886.

Axes: H x W pixels, n colours.
"""

import functools

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter

PQ, HLG = 16, 18  # codes of ITU-T H.273 for the transfer characteristics
BT2020, UNKNOWN = 9, 2  # and for the primaries
PEAK, WHITE = 1000.0, 203.0  # cd/m2: of what is shown, by BT.2408 of which the latter is the white of a page
GRID = 65  # colours along each axis of the table

_LUMINANCE = np.array([0.2627, 0.6780, 0.0593])
_TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])
_M1, _M2, _C1, _C2, _C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128


def is_hdr(transfer: int) -> bool:
    """Whether pictures with these transfer characteristics are to be mapped."""
    return transfer in (PQ, HLG)


def to_sdr(pixels: UInt8[np.ndarray, "H W 3"], transfer: int, primaries: int) -> UInt8[np.ndarray, "H W 3"]:
    """An RGB picture in BT.709's signal, out of one in PQ's or HLG's.

    Args:
        transfer, primaries: codes of ITU-T H.273.
    """
    return np.array(Image.fromarray(pixels).filter(_table(transfer, primaries in (BT2020, UNKNOWN))))


@functools.lru_cache
def _table(transfer: int, wide: bool) -> ImageFilter.Color3DLUT:
    steps = np.linspace(0, 1, GRID)
    blue, green, red = (axis.ravel() for axis in np.meshgrid(steps, steps, steps, indexing="ij"))  # red runs fastest
    signal = map_signal(np.stack([red, green, blue], axis=1), transfer, wide)
    return ImageFilter.Color3DLUT(GRID, signal.ravel().tolist())


def map_signal(signal: Float[np.ndarray, "n 3"], transfer: int, wide: bool) -> Float[np.ndarray, "n 3"]:
    """RGB signals from 0 to 1 in BT.709, out of PQ's or HLG's.

    Args:
        wide: whether the colours are BT.2020's.
    """
    light = _lowered(_pq_light(signal) if transfer == PQ else _hlg_light(signal)) / WHITE
    if wide:
        light = light @ _TO_BT709.T
    return np.clip(light, 0, 1) ** (1 / 2.4)


def _pq_light(signal: np.ndarray) -> np.ndarray:
    """cd/m2"""
    root = signal ** (1 / _M2)
    return 10000 * (np.maximum(root - _C1, 0) / (_C2 - _C3 * root)) ** (1 / _M1)


def _pq_signal(light: np.ndarray) -> np.ndarray:
    root = (light / 10000) ** _M1
    return ((_C1 + _C2 * root) / (1 + _C3 * root)) ** _M2


def _hlg_light(signal: np.ndarray) -> np.ndarray:
    """cd/m2"""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    return PEAK * scene * (scene @ _LUMINANCE)[:, None] ** 0.2


def _lowered(light: np.ndarray) -> np.ndarray:
    """BT.2390's curve from PEAK to WHITE, in cd/m2: light up to its knee is left as it is."""
    top, most = _pq_signal(np.array([PEAK, WHITE]))
    most /= top
    signal = np.minimum(_pq_signal(light) / top, 1)
    knee = 1.5 * most - 0.5
    t = (signal - knee) / (1 - knee)
    bent = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * most
    return _pq_light(np.where(signal < knee, signal, bent) * top)
