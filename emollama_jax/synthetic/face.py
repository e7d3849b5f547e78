"""Drawn faces that move by action units, for synthetic clips.

Axes: H x W pixels, t frames. Inside a face, x and y count in half-widths of the face from its centre, y downwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

SIZE = 144  # pixels, both ways
OVERSAMPLING = 2  # drawn larger, then averaged: PIL does not anti-alias
TALL = 1.3  # a face's half-height in half-widths

# The action units (0 to 1) of each level of the face factor at the peak.
EXPRESSIONS: dict[str, dict[str, float]] = {
    "smile": {"AU06": 0.9, "AU12": 1.0, "AU25": 0.8},
    "drawn": {"AU01": 0.9, "AU04": 0.9, "AU07": 0.5, "AU15": 1.0, "AU17": 0.7},
    "wide": {"AU01": 0.8, "AU02": 1.0, "AU05": 1.0, "AU25": 0.8, "AU26": 1.0},
}

Color = tuple[int, int, int]
SKINS: tuple[Color, ...] = ((250, 222, 200), (236, 190, 155), (214, 160, 118), (178, 124, 86), (130, 88, 62))
HAIRS: tuple[Color, ...] = ((32, 24, 22), (74, 46, 28), (120, 78, 40), (176, 140, 82), (132, 128, 126))
IRISES: tuple[Color, ...] = ((70, 46, 28), (60, 90, 60), (62, 92, 132))
LIPS: Color = (176, 62, 66)
INSIDE: Color = (66, 18, 24)
WHITE: Color = (246, 244, 240)


@dataclass(frozen=True, slots=True)
class Look:
    """Identity, position and background of a clip's face, independent of the emotion."""

    center: tuple[float, float] = (SIZE / 2, 0.52 * SIZE)
    """Centre of the face, in pixels."""
    radius: float = 40.0
    """Half the face's width, in pixels."""
    skin: Color = SKINS[1]
    hair: Color = HAIRS[1]
    iris: Color = IRISES[0]
    shirt: Color = (70, 90, 130)
    wall: tuple[Color, Color] = ((196, 206, 214), (150, 160, 176))
    """The background's colour at the top and at the bottom."""
    window: tuple[float, float, float, float] = (0.06, 0.08, 0.3, 0.4)
    """A lighter patch of the background: left, top, right, bottom, in parts of the picture."""
    long_hair: bool = False

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the face without its hair, in pixels."""
        (x, y), rx, ry = self.center, self.radius, TALL * self.radius
        return round(x - rx), round(y - ry), round(x + rx), round(y + ry)


def random_look(rng: np.random.Generator) -> Look:
    """Draw a look whose whole head lies inside the picture and fills most of it."""
    radius = rng.uniform(37, 46)
    x = SIZE / 2 + rng.uniform(-8, 8)
    y = rng.uniform(1.55 * radius, min(1.55 * radius + 12, SIZE - 1.5 * radius))
    left, top = rng.uniform(0, 0.7, 2)
    light = rng.integers(110, 230, 3)
    return Look(
        center=(x, y),
        radius=radius,
        skin=_mix(SKINS[k := int(rng.integers(len(SKINS) - 1))], SKINS[k + 1], rng.uniform()),
        hair=HAIRS[rng.integers(len(HAIRS))],
        iris=IRISES[rng.integers(len(IRISES))],
        shirt=_color(rng.integers(40, 200, 3)),
        wall=(_color(light), _color(light * rng.uniform(0.6, 0.95))),
        window=(left, top, left + rng.uniform(0.1, 0.3), top + rng.uniform(0.1, 0.3)),
        long_hair=bool(rng.integers(2)),
    )


def draw_face(aus: Mapping[str, float], look: Look | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """One frame, RGB.

    Args:
        aus: action units from 0 to 1, by name (AU01 02 04 05 06 07 12 15 17 25 26); missing ones are 0.
        look: default: that of `Look()`.
    """
    look = look or Look()
    image = _still_part(look).copy()
    pen = _Pen(image, look)
    au = lambda name: aus.get(name, 0.0)
    _jaw(pen, look, au)
    _folds(pen, look, au)
    _mouth(pen, au)
    _eyes(pen, look, au)
    _brows(pen, look, au)
    return np.asarray(image.reduce(OVERSAMPLING))


def motion(peak_index: int, num_frames: int) -> Float[np.ndarray, " t"]:
    """Intensity of the expression in each frame: 0 in the first, 1 at the peak, almost 0 in the last.

    The maximum is sharp, so that the peak frame is unambiguous.
    """
    frame = np.arange(num_frames)
    rise, fall = frame / peak_index, (num_frames - frame) / (num_frames - peak_index)
    return np.minimum(rise, fall) ** 1.3


def _color(values: np.ndarray) -> Color:
    red, green, blue = (int(value) for value in values)
    return red, green, blue


def _mix(a: Color, b: Color, part: float) -> Color:
    return _color(np.round(np.array(a) * (1 - part) + np.array(b) * part))


class _Pen:
    """Draws in a face's own coordinates."""

    def __init__(self, image: Image.Image, look: Look):
        self.draw = ImageDraw.Draw(image)
        self.unit = look.radius * OVERSAMPLING
        self.x, self.y = (OVERSAMPLING * c for c in look.center)

    def _at(self, points):
        return [(self.x + self.unit * x, self.y + self.unit * y) for x, y in points]

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Color) -> None:
        self.draw.ellipse(self._at([(x - rx, y - ry), (x + rx, y + ry)]), fill=fill)

    def chord(self, x: float, y: float, rx: float, ry: float, start: float, end: float, fill: Color) -> None:
        self.draw.chord(self._at([(x - rx, y - ry), (x + rx, y + ry)]), start, end, fill=fill)

    def polygon(self, points, fill: Color) -> None:
        self.draw.polygon(self._at(points), fill=fill)

    def line(self, points, width: float, fill: Color) -> None:
        self.draw.line(self._at(points), fill=fill, width=max(1, round(width * self.unit)), joint="curve")


@lru_cache(maxsize=2)  # a clip's frames share it
def _still_part(look: Look) -> Image.Image:
    side = SIZE * OVERSAMPLING
    ramp = np.linspace(0, 1, side)[:, None, None]
    wall = np.array(look.wall[0]) * (1 - ramp) + np.array(look.wall[1]) * ramp
    image = Image.fromarray(np.broadcast_to(wall, (side, side, 3)).astype(np.uint8))
    pen = _Pen(image, look)
    pen.draw.rectangle([side * part for part in look.window], fill=_mix(look.wall[0], (255, 255, 255), 0.45))

    shade = _mix(look.skin, (60, 30, 20), 0.22)
    pen.ellipse(0.0, 2.75, 1.75, 1.15, look.shirt)
    pen.polygon([(-0.36, 0.9), (0.36, 0.9), (0.42, 1.8), (-0.42, 1.8)], shade)
    pen.ellipse(0.0, -0.28, 1.13, 1.25, look.hair)
    if look.long_hair:
        pen.polygon([(-1.13, -0.3), (1.13, -0.3), (1.16, 1.25), (-1.16, 1.25)], look.hair)
        pen.polygon([(-0.36, 0.9), (0.36, 0.9), (0.42, 1.8), (-0.42, 1.8)], shade)
    else:
        for side_of_head in (-1, 1):
            pen.ellipse(side_of_head * 1.0, 0.05, 0.14, 0.24, shade)
    pen.ellipse(0.0, 0.0, 1.0, TALL, look.skin)
    pen.chord(0.0, -0.28, 1.02, 1.06, 215.0, 325.0, look.hair)
    return image


def _jaw(pen: _Pen, look: Look, au) -> None:
    """Lower the chin with the jaw."""
    pen.ellipse(0.0, 0.55 + 0.14 * au("AU26"), 0.72, 0.75, look.skin)


def _folds(pen: _Pen, look: Look, au) -> None:
    """Draw the nose, the cheeks and the wrinkles of the other action units."""
    line = lambda amount, most=0.4: _mix(look.skin, (70, 30, 20), most * amount)
    pen.line([(0.02, -0.12), (0.1, 0.26), (-0.06, 0.28)], 0.05, line(1.0))
    for side in (-1, 1):
        pen.ellipse(side * 0.56, 0.3, 0.2, 0.14, _mix(look.skin, (222, 90, 80), 0.3 * au("AU06")))
        pen.line([(side * x, y) for x, y in ((0.26, 0.1), (0.42, 0.13), (0.6, 0.08))], 0.035, line(au("AU06")))
        pen.line([(side * x, y) for x, y in ((0.22, 0.24), (0.4, 0.4), (0.5, 0.6))], 0.035, line(au("AU12"), 0.25))
        pen.line([(side * 0.07, -0.34), (side * 0.06, -0.5)], 0.04, line(au("AU04")))
    pen.line([(-0.16, 0.97), (0, 0.92), (0.16, 0.97)], 0.05, line(au("AU17")))


def _mouth(pen: _Pen, au) -> None:
    half_width = 0.33 * (1 + 0.35 * au("AU12") - 0.1 * au("AU15") - 0.22 * au("AU26"))
    corner = 0.62 - 0.17 * au("AU12") + 0.13 * au("AU15")
    gap = 0.13 * au("AU25") + 0.37 * au("AU26")
    upper = 0.62 + 0.05 * au("AU12") - 0.06 * au("AU15") - 0.25 * gap - 0.03 * au("AU17")
    lower = upper + gap
    x = np.linspace(-1, 1, 15)
    bow = 1 - x**2
    curve = lambda middle: list(zip(half_width * x, corner + (middle - corner) * bow, strict=True))
    pen.polygon(curve(upper) + curve(lower)[::-1], INSIDE)
    if gap > 0.06:
        teeth = upper + min(0.12, 0.6 * gap)
        pen.polygon(curve(upper) + curve(teeth)[::-1], WHITE)
    pen.line(curve(lower + 0.02), 0.1, LIPS)
    pen.line(curve(upper - 0.01), 0.08, _mix(LIPS, INSIDE, 0.25))


def _eyes(pen: _Pen, look: Look, au) -> None:
    upper = 0.1 * (1 + 0.85 * au("AU05") - 0.35 * au("AU07") - 0.15 * au("AU06"))
    lower = 0.08 * (1 + 0.3 * au("AU05") - 0.35 * au("AU07") - 0.6 * au("AU06"))
    height, y = (upper + lower) / 2, -0.12 + (lower - upper) / 2
    for side in (-1, 1):
        x = side * 0.42
        pen.ellipse(x, y, 0.2, height, WHITE)
        pen.ellipse(x, y, 0.09, min(0.1, height), look.iris)
        pen.ellipse(x, y, 0.045, min(0.05, height), (16, 12, 12))
        lid = np.linspace(-1, 1, 9)
        edge = zip(x + 0.21 * lid, y - (height + 0.01) * np.sqrt(1 - 0.98 * lid**2), strict=True)
        pen.line(list(edge), 0.045, _mix(look.skin, (24, 14, 12), 0.85))


def _brows(pen: _Pen, look: Look, au) -> None:
    inner = -0.4 - 0.26 * au("AU01") + 0.12 * au("AU04")
    outer = -0.4 - 0.22 * au("AU02") + 0.08 * au("AU04")
    middle = (inner + outer) / 2 - 0.09 - 0.03 * au("AU02")
    inside = 0.2 - 0.06 * au("AU04")
    color = _mix(look.hair, (20, 14, 12), 0.45)
    for side in (-1, 1):
        points = [(inside, inner), (0.42, middle), (0.68, outer + 0.02)]
        pen.line([(side * x, y) for x, y in points], 0.1, color)
