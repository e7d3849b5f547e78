"""A clip's crops side by side in one picture, for people to look at."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from emollama_jax.media.faces import FaceCrops

FOUND, NOT_FOUND, PEAK = (40, 40, 40), (200, 60, 40), (30, 150, 60)
BAR = 18  # pixels below a crop, for its frame's number
GAP = 4


def contact_sheet(
    faces: FaceCrops, *, peak: int | None = None, most: int = 48, columns: int = 8, tile: int = 112
) -> Image.Image:
    """The crops in order, each above its frame's number: in red where no face was found, in green at the peak.

    Args:
        peak: the peak's frame; it is always shown.
        most: crops; of more, some are left out evenly.
        columns: crops in a row.
        tile: pixels of a crop.
    """
    shown = set(np.linspace(0, len(faces.crops) - 1, min(most, len(faces.crops))).round().astype(int).tolist())
    shown |= set(np.flatnonzero(faces.indices == peak).tolist()) if peak is not None else set()
    columns = min(columns, len(shown))
    size = (columns * (tile + GAP) + GAP, -(-len(shown) // columns) * (tile + BAR + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for place, i in enumerate(sorted(shown)):
        x, y = GAP + place % columns * (tile + GAP), GAP + place // columns * (tile + BAR + GAP)
        number, note, color = int(faces.indices[i]), "", FOUND
        if not faces.found[i]:
            note, color = " no face", NOT_FOUND
        if number == peak:
            note, color = note + " peak", PEAK
        sheet.paste(Image.fromarray(faces.crops[i]).resize((tile, tile), Image.Resampling.BICUBIC), (x, y))
        draw.rectangle([x, y + tile, x + tile - 1, y + tile + BAR - 1], fill=color)
        draw.text((x + 3, y + tile + 1), f"{number}{note}", fill="white", font=font)
        if number == peak:
            draw.rectangle([x, y, x + tile - 1, y + tile + BAR - 1], outline=PEAK, width=3)
    return sheet
