"""Images as the vision encoders take them: RGB, uint8, of the encoder's size. Normalising is the encoders' part.

Axes: I x J pixels, t frames.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageOps

from emollama_jax.errors import UserError

MAX_ASPECT = 1000  # a clip's longer side is resized in proportion: beyond this it would fill the memory

ImageLike = str | Path | Image.Image | Shaped[np.ndarray, "..."]


def to_rgb(image: ImageLike) -> Image.Image:
    """An RGB image from a file, an image, or uint8 pixels [I, J], [I, J, 1], [I, J, 3] (RGB) or [I, J, 4] (RGBA).

    Grey becomes three equal channels, transparency is dropped, 16-bit grey keeps its upper 8 bits, and a photo is
    turned upright as its metadata say.

    Raises:
        UserError: not an image, damaged, too large, or pixels of another shape or dtype.
    """
    where = str(image) if isinstance(image, str | Path) else "image"
    if isinstance(image, np.ndarray):
        image = _from_pixels(image)
    try:
        if isinstance(image, str | Path):
            with Image.open(image) as file:
                file.load()
                image = file
        image = ImageOps.exif_transpose(image)  # a copy in any case
    except FileNotFoundError as error:
        raise UserError(f"no such file: {where}; check the path") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{where}: too many pixels to open safely; make it smaller") from error
    except Exception as error:  # each decoder has its own kinds
        raise UserError(f"not an image, or damaged or cut short: {where}; copy it again or leave it out") from error
    if 0 in image.size:
        raise UserError(f"{where}: has no pixels; leave it out")
    if image.mode in ("F", "La"):  # floats of an unknown range, and what PIL cannot convert
        raise UserError(f"{where}: pixels of the kind {image.mode!r}; convert it to RGB")
    if image.mode.startswith("I"):  # PIL would cut 16 bits off at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    image.info.pop("transparency", None)  # PIL warns where it drops a palette's
    return image.convert("RGB")


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)):
        raise UserError(
            f"image: pixels are {pixels.dtype} {list(pixels.shape)}; give uint8 [height, width] or "
            "[height, width, 1, 3 or 4 channels]"
        )
    if 0 in pixels.shape:
        raise UserError(f"image: pixels are {list(pixels.shape)}, there are none; leave it out")
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def eva_vit_frame(image: ImageLike, size: int = 448) -> UInt8[np.ndarray, "I J 3"]:
    """A frame for `EvaVit.encode`: stretched to size x size, bicubic with antialiasing, as the reference does."""
    return np.array(to_rgb(image).resize((size, size), Image.Resampling.BICUBIC))


def mae_face(image: ImageLike, size: int = 224) -> UInt8[np.ndarray, "I J 3"]:
    """A face crop for `Mae.encode`: stretched to size x size, bilinear with antialiasing, as transformers'
    `ViTImageProcessor` does."""
    return np.array(to_rgb(image).resize((size, size), Image.Resampling.BILINEAR))


def videomae_clip(frames: Sequence[ImageLike], size: int = 224) -> UInt8[np.ndarray, "t I J 3"]:
    """Frames for `VideoMae.encode`: the shorter side to `size`, bilinear with antialiasing, then the centre of the
    longer one, as transformers' `VideoMAEImageProcessor` does.

    Raises:
        UserError: no frames, one longer than `MAX_ASPECT` times its width, or as `to_rgb`.
    """
    if len(frames) == 0:
        raise UserError("clip: no frames; leave it out")
    return np.stack([_shorter_side(to_rgb(frame), size) for frame in frames])


def _shorter_side(image: Image.Image, size: int) -> UInt8[np.ndarray, "I J 3"]:
    width, height = image.size
    short = min(width, height)
    if max(width, height) > MAX_ASPECT * short:
        raise UserError(f"image: {width} x {height} pixels, a side {MAX_ASPECT} times the other or more; leave it out")
    width, height = (size if side == short else int(size * side / short) for side in (width, height))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


def even_indices(num_frames: int, wanted: int = 16) -> list[int]:
    """Which of a clip's frames `VideoMae` sees: floor(i n / wanted), or all and the last repeated when they are fewer.

    Raises:
        UserError: no frames.
    """
    if num_frames < 1:
        raise UserError("clip: no frames; leave it out")
    if num_frames < wanted:
        return [min(i, num_frames - 1) for i in range(wanted)]
    return [i * num_frames // wanted for i in range(wanted)]
