"""What action units look like, in words: phrases for each unit, one of which a seed chooses for a clip."""

import re
import zlib
from collections.abc import Iterable

import numpy as np

VERSION = 2  # counted up when the same seed would give other phrases

PHRASES: dict[str, tuple[str, ...]] = {
    "AU01": ("the inner ends of the brows rise", "the middle of the brows is lifted", "inner brows drawn upwards"),
    "AU02": ("the outer ends of the brows rise", "the brows arch at their outer ends", "outer brows lifted"),
    "AU04": ("the brows are lowered and drawn together", "a frown between the brows", "the brows knit"),
    "AU05": ("the upper lids are raised", "the eyes open wide", "the eyes widen"),
    "AU06": ("the cheeks are raised", "the cheeks push up towards the eyes", "lifted cheeks that narrow the eyes"),
    "AU07": ("the lids are tightened", "the eyes narrow", "tense lower lids"),
    "AU09": ("the nose is wrinkled", "wrinkles at the root of the nose", "the nose draws up"),
    "AU10": ("the upper lip is raised", "the upper lip draws upwards", "a lifted upper lip"),
    "AU12": ("the corners of the lips are pulled up", "the mouth curves into a smile", "lip corners drawn upwards"),
    "AU14": ("the corners of the mouth are tightened inwards", "dimples beside the mouth", "pressed mouth corners"),
    "AU15": ("the corners of the lips are pulled down", "the mouth turns down", "drooping mouth corners"),
    "AU17": ("the chin is raised", "the chin pushes up the lower lip", "a tense, wrinkled chin"),
    "AU20": ("the lips are stretched sideways", "the mouth is drawn wide and flat", "lips stretched towards the ears"),
    "AU23": ("the lips are tightened", "tight, narrowed lips", "the lips draw together firmly"),
    "AU24": ("the lips are pressed together", "pressed lips", "the lips shut tightly"),
    "AU25": ("the lips are parted", "the mouth is slightly open", "lips apart"),
    "AU26": ("the jaw drops", "the mouth falls open", "a lowered jaw"),
    "AU28": ("the lips are sucked in", "the lips roll inwards", "lips drawn between the teeth"),
    # Of blendshapes, and only what is seen: a grimace draws the corners of the mouth, too.
    "browInnerUp": ("the middle of the brows goes up", "the inner brows are higher than before", "inner brows move up"),
    "browOuterUp": ("the outer brows go up", "the brows are higher than before", "outer brows move up"),
    "jawOpen": ("the jaw opens", "the mouth opens", "the chin goes down"),
    "mouthSmile": ("the corners of the mouth move out and up", "the mouth widens upwards", "mouth corners drawn up"),
    "mouthUpperUp": ("the upper lip goes up", "the upper teeth show", "the upper lip is drawn up"),
}


def describe_units(units: Iterable[str], name: str, seed: int = 0) -> list[str]:
    """Chooses a phrase for each unit that has any, in order; the same for the same clip, unit and seed.

    Of a blendshape's two sides the first is described, for both.

    Args:
        name: the clip's.
    """
    chosen = []
    for unit in dict.fromkeys(re.sub("(Left|Right)$", "", unit) for unit in units):
        if phrases := PHRASES.get(unit):
            rng = np.random.default_rng((seed, zlib.crc32(f"{name} {unit}".encode("utf-8", "surrogateescape"))))
            chosen.append(phrases[rng.integers(len(phrases))])
    return chosen
