"""Frames of a video, side by side: what `contact_sheet` runs where PyAV is.

Axes: H x W pixels.
"""

import io
import sys

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from emollama_jax.errors import as_user_error
from emollama_jax.media.images import even_indices
from emollama_jax.media.video import Video

WIDTH, GAP = 200, 4  # pixels, of a frame and between two


def draw_sheet(video: str, frames: int, columns: int) -> UInt8[np.ndarray, "H W 3"]:
    """Draw frames at even distances, row by row, each with its time in seconds.

    Raises:
        UserError: the video cannot be read.
    """
    with Video(video) as opened:
        indices = sorted({int(index) for index in even_indices(opened.num_frames, frames)})
        times, (width, height) = opened.times, opened.size
        size = WIDTH, max(1, round(WIDTH * height / width))
        rows = -(-len(indices) // columns)
        shape = columns * (WIDTH + GAP) - GAP, rows * (size[1] + GAP) - GAP
        sheet = Image.new("RGB", shape, "white")
        draw = ImageDraw.Draw(sheet)
        for place, (index, pixels) in enumerate(zip(indices, opened.frames(indices), strict=True)):
            x, y = place % columns * (WIDTH + GAP), place // columns * (size[1] + GAP)
            sheet.paste(Image.fromarray(pixels).resize(size), (x, y))
            text = f"{times[index]:.2f} s"
            draw.text((x + 6, y + 4), text, fill="white", font_size=15, stroke_width=2, stroke_fill="black")
    return np.asarray(sheet)


def main(video: str, frames: str, columns: str) -> None:
    """Write the sheet as a PNG on standard output, or one line of what is wrong on standard error."""
    try:
        sheet = draw_sheet(video, int(frames), int(columns))
    except Exception as error:
        if (known := as_user_error(error)) is None:
            raise
        raise SystemExit(str(known)) from error
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "PNG")
    sys.stdout.buffer.write(file.getvalue())
