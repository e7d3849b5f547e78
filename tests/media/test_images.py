"""Images for the vision encoders: against Hugging Face's processors on real files, and of every kind that PIL reads."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from emollama_jax.errors import UserError
from emollama_jax.media.images import eva_vit_frame, even_indices, mae_face, to_rgb, videomae_clip
from emollama_jax.models.eva_vit import CLIP_MEAN, CLIP_STD
from emollama_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD, normalize

HEIGHT, WIDTH = 20, 30


@pytest.fixture(scope="module")
def photos(real_media):
    """The stills and a frame of the video as RGB images: two broader than high, one higher than broad."""
    av = pytest.importorskip("av")
    with av.open(str(real_media.clips[0])) as file:
        frame = next(file.decode(video=0)).to_image()
    return [*(Image.open(path).convert("RGB") for path in real_media.stills), frame]


@pytest.fixture(scope="module")
def frames(real_media):
    """Three frames of the video, 240 high and 320 broad."""
    av = pytest.importorskip("av")
    with av.open(str(real_media.clips[0])) as file:
        every = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    return [every[0], every[50], every[-1]]


def assert_same_pixels(ours, theirs, mean, std):
    """Our uint8 pixels, normalised as the model does, are a processor's [3, I, J], which are float32 too."""
    assert ours.dtype == np.uint8
    ours = np.moveaxis(np.asarray(normalize(jnp.asarray(ours), mean, std)), -1, -3)
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.float32
    error = np.abs((ours - theirs) * np.reshape(std, (3, 1, 1))).max()
    print(f"largest difference, of pixels from 0 to 1: {error:.1e}")
    assert error < 1e-6  # no pixel is another: one step of 255 is 4e-3


def test_eva_vit_frames_are_a_bicubic_resize(photos):
    for photo in photos:
        pixels = np.asarray(photo.resize((448, 448), Image.Resampling.BICUBIC), np.float32) / 255
        reference = (pixels - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
        assert_same_pixels(eva_vit_frame(photo), np.moveaxis(reference, -1, 0), CLIP_MEAN, CLIP_STD)


def test_eva_vit_frames_are_those_of_hugging_faces_blip(photos):
    transformers = pytest.importorskip("transformers")
    size = {"height": 448, "width": 448}
    processor = transformers.BlipImageProcessor(
        size=size, resample=Image.Resampling.BICUBIC, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
    for photo in photos:
        reference = processor(photo, return_tensors="np")["pixel_values"][0]
        assert_same_pixels(eva_vit_frame(photo), reference, CLIP_MEAN, CLIP_STD)


def test_mae_faces_are_those_of_hugging_faces_vit(photos):
    transformers = pytest.importorskip("transformers")
    processor = transformers.ViTImageProcessor(
        size={"height": 224, "width": 224}, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD
    )
    for photo in photos:
        reference = processor(photo, return_tensors="np")["pixel_values"][0]
        assert_same_pixels(mae_face(photo), reference, IMAGENET_MEAN, IMAGENET_STD)


SHAPES = {
    "landscape": lambda frame: frame,
    "portrait": lambda frame: np.ascontiguousarray(frame.swapaxes(0, 1)),
    "square": lambda frame: frame[:, 40:280],
    "odd": lambda frame: frame[:, :301],  # 281 pixels after the resize: the cut is not in the middle
    "small": lambda frame: frame[100:151, 100:167],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_videomae_clips_are_those_of_hugging_face(frames, shape):
    transformers = pytest.importorskip("transformers")
    processor = transformers.VideoMAEImageProcessor(
        size={"shortest_edge": 224},
        crop_size={"height": 224, "width": 224},
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    clip = [SHAPES[shape](frame) for frame in frames]
    reference = processor(clip, return_tensors="np")["pixel_values"][0]
    assert_same_pixels(videomae_clip(clip), reference, IMAGENET_MEAN, IMAGENET_STD)


def test_a_file_is_the_image_in_it(real_media):
    for path in real_media.stills:
        expected = Image.open(path).convert("RGB")
        for source in (path, str(path), Image.open(path), np.asarray(expected)):
            assert np.array_equal(to_rgb(source), expected)


@pytest.mark.parametrize("function, size", [(eva_vit_frame, 448), (mae_face, 224), (eva_vit_frame, 56), (mae_face, 32)])
@pytest.mark.parametrize("height, width", [(1, 1), (1, 500), (500, 1)])
def test_images_of_extreme_shape_are_stretched(function, size, height, width):
    pixels = np.full((height, width, 3), (10, 20, 30), np.uint8)
    image = function(pixels) if size > 200 else function(pixels, size)
    assert image.shape == (size, size, 3)
    assert np.array_equal(np.unique(image.reshape(-1, 3), axis=0), [[10, 20, 30]])


@pytest.mark.parametrize("height, width", [(1, 1), (1, 500), (500, 1), (1000, 1)])
def test_clips_of_extreme_shape_are_cut_in_the_middle(height, width):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, height * width).reshape(height, width)
    clip = videomae_clip([pixels], size=32)
    assert clip.shape == (1, 32, 32, 3)
    middle = pixels[max(0, height // 2 - 1) : height // 2 + 1, max(0, width // 2 - 1) : width // 2 + 1, 0]
    assert middle.min() <= clip[..., 0].min() and clip[..., 0].max() <= middle.max()


def test_clips_that_would_fill_the_memory_are_refused():
    with pytest.raises(UserError, match="^image: 1 x 1001 pixels, .*leave it out$"):
        videomae_clip([np.zeros((1001, 1, 3), np.uint8)])


# Images of every kind. The left half is darker than the right, the upper than the lower.
GREY = (np.arange(HEIGHT)[:, None] * 3 + np.arange(WIDTH) * 6).astype(np.uint8)
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)
DEEP = GREY.astype(np.uint16) * 256 + 255  # 16 bits whose lower ones are lost
ALPHA = np.where(GREY % 2, 255, 7).astype(np.uint8)


def three(grey):
    return np.repeat(grey[..., None], 3, axis=-1)


def with_alpha(pixels):
    return np.dstack([pixels, ALPHA])


def palette(**info):
    """Twenty colours (k, 2 k, 3 k), and the pixels that they make."""
    image = Image.fromarray(GREY % 20).convert("P")
    image.putpalette([value * k for k in range(20) for value in (1, 2, 3)])
    image.putdata((GREY % 20).ravel().tolist())
    image.info.update(info)
    return image, (GREY % 20)[..., None] * np.array([1, 2, 3], np.uint8)


KINDS = {
    "RGB": (Image.fromarray(COLOUR), COLOUR),
    "RGBA": (Image.fromarray(with_alpha(COLOUR)), COLOUR),
    "L": (Image.fromarray(GREY), three(GREY)),
    "LA": (Image.fromarray(with_alpha(GREY), "LA"), three(GREY)),
    "1": (Image.fromarray(GREY > 90), three(np.where(GREY > 90, 255, 0))),
    "I;16": (Image.fromarray(DEEP), three(GREY)),
    "I;16B": (Image.fromarray(DEEP.astype(">u2")), three(GREY)),
    "I": (Image.fromarray(DEEP.astype(np.int32)), three(GREY)),
    "I, beyond 16 bits": (
        Image.fromarray(DEEP.astype(np.int32) * 4 - 65536),
        three((DEEP.astype(int) * 4 - 65536).clip(0, 65535) // 256),
    ),
    "P": palette(),
    "P, one transparent": palette(transparency=3),
    "P, transparencies": palette(transparency=bytes(range(20))),
    "PA": (palette()[0].convert("PA"), palette()[1]),
    "CMYK": (Image.fromarray(np.dstack([255 - COLOUR, 0 * GREY]), "CMYK"), COLOUR),
}


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_becomes_rgb(kind):
    image, expected = KINDS[kind]
    before = image.copy()
    with warnings.catch_warnings(action="error"):
        rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    assert np.array_equal(rgb, expected)
    assert image == before, "the caller's image is left as it was"


@pytest.mark.parametrize(
    "name, kind",
    [
        ("a.png", "RGB"),
        ("a.png", "RGBA"),
        ("a.png", "L"),
        ("a.png", "LA"),
        ("a.png", "1"),
        ("a.png", "I;16"),
        ("a.png", "P, one transparent"),
        ("a.png", "P, transparencies"),
        ("a.gif", "P, one transparent"),
        ("a.tif", "I;16"),
        ("a.tif", "I;16B"),
        ("a.tif", "I"),
        ("a.tif", "CMYK"),
        ("a.bmp", "RGB"),
    ],
)
def test_files_of_every_kind_become_rgb(tmp_path, name, kind):
    image, expected = KINDS[kind]
    image.save(tmp_path / name)
    with warnings.catch_warnings(action="error"):
        assert np.array_equal(to_rgb(tmp_path / name), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_of_every_kind_become_rgb(tmp_path, mode):
    Image.fromarray(COLOUR).convert(mode).save(tmp_path / "a.jpg", quality=100, subsampling=0)
    expected = np.array(Image.fromarray(COLOUR).convert(mode).convert("RGB"), int)
    assert np.abs(np.array(to_rgb(tmp_path / "a.jpg"), int) - expected).max() < 8


@pytest.mark.parametrize(
    "pixels, expected",
    [
        (COLOUR, COLOUR),
        (with_alpha(COLOUR), COLOUR),
        (GREY, three(GREY)),
        (GREY[..., None], three(GREY)),
        (COLOUR[:, :, ::-1], COLOUR[:, :, ::-1]),  # not contiguous
        (COLOUR[::-1, ::2], COLOUR[::-1, ::2]),
        (COLOUR[:3], COLOUR[:3]),
        (COLOUR[:1, :1], COLOUR[:1, :1]),
    ],
    ids=["rgb", "rgba", "grey", "grey in one channel", "flipped channels", "flipped and skipped", "3 high", "1x1"],
)
def test_pixels_become_rgb(pixels, expected):
    assert np.array_equal(to_rgb(pixels), expected)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "16 bits.png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(tmp_path, name, orientation):
    """A camera held another way writes its pixels turned, and notes how."""
    turned = {
        1: COLOUR,
        2: COLOUR[:, ::-1],
        3: COLOUR[::-1, ::-1],
        4: COLOUR[::-1],
        5: COLOUR.swapaxes(0, 1),
        6: np.rot90(COLOUR),
        7: np.rot90(COLOUR.swapaxes(0, 1), 2),
        8: np.rot90(COLOUR, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright, turned = (COLOUR, turned) if "16" not in name else (three(COLOUR[..., 0]), turned[..., 0] * np.uint16(256))
    options = {"quality": 100} | ({"lossless": True} if name == "a.webp" else {})
    Image.fromarray(np.ascontiguousarray(turned)).save(tmp_path / name, exif=exif, **options)
    assert np.abs(np.array(to_rgb(tmp_path / name), int) - upright).max() < 16


@pytest.mark.parametrize(
    "pixels, problem",
    [
        (np.zeros((0, 5, 3), np.uint8), r"\[0, 5, 3\]"),
        (np.zeros((5, 0), np.uint8), r"\[5, 0\]"),
        (np.zeros((5, 6, 0), np.uint8), r"uint8 \[5, 6, 0\]"),
        (np.zeros((5, 6, 3)), r"float64 \[5, 6, 3\]"),
        (np.zeros((5, 6), np.uint16), r"uint16 \[5, 6\]"),
        (np.zeros((5, 6), bool), r"bool \[5, 6\]"),
        (np.zeros((3, 5, 6), np.uint8), r"uint8 \[3, 5, 6\]"),
        (np.zeros((2, 5, 6, 3), np.uint8), r"uint8 \[2, 5, 6, 3\]"),
        (np.zeros(3, np.uint8), r"uint8 \[3\]"),
        (np.zeros((5, 6, 2), np.uint8), r"uint8 \[5, 6, 2\]"),
        (Image.new("RGB", (0, 5)), "no pixels"),
        (Image.new("F", (5, 5)), "'F'"),
        (Image.new("La", (5, 5)), "'La'"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,  # an image's own text has its address
)
def test_what_is_no_image_is_refused(pixels, problem):
    with pytest.raises(UserError, match=f"^image: .*{problem}.*(give uint8|leave it out|convert it)") as caught:
        to_rgb(pixels)
    assert "\n" not in str(caught.value)


def damaged_files(folder):
    """Files that are no images, by name."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("jpg", "png", "webp", "tif"):
        noise.save(folder / f"whole.{suffix}", exif=exif)
        data = (folder / f"whole.{suffix}").read_bytes()
        (folder / f"cut.{suffix}").write_bytes(data[: len(data) * 2 // 3])
        (folder / f"header.{suffix}").write_bytes(data[:30])
    (folder / "exif.webp").write_bytes((folder / "whole.webp").read_bytes().replace(b"MM\0*", b"MM\1*"))
    (folder / "text.jpg").write_text("not a photo")
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.jpg").mkdir()
    return [path for path in sorted(folder.iterdir()) if path.stem != "whole"]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_files_are_refused_by_name(tmp_path):
    files = damaged_files(tmp_path)
    assert len(files) == 12
    for path in files:
        with pytest.raises(UserError, match=f"^not an image, or damaged or cut short: {path}; copy it again") as caught:
            to_rgb(path)
        assert "\n" not in str(caught.value)


def test_an_image_opened_elsewhere_may_be_damaged_too(tmp_path):
    path = next(path for path in damaged_files(tmp_path) if path.name == "cut.jpg")
    with Image.open(path) as image, pytest.raises(UserError, match="^not an image, or damaged or cut short: image;"):
        to_rgb(image)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=f"^no such file: {tmp_path}/a.jpg; check the path$"):
        to_rgb(tmp_path / "a.jpg")


def test_a_file_of_too_many_pixels(tmp_path, monkeypatch):
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="a.png: too many pixels to open safely; make it smaller$"):
        to_rgb(tmp_path / "a.png")


@pytest.mark.parametrize("frames", [[], np.zeros((0, 5, 5, 3), np.uint8)], ids=["list", "array"])
def test_a_clip_has_frames(frames):
    with pytest.raises(UserError, match="^clip: no frames; leave it out$"):
        videomae_clip(list(frames))


def test_a_clips_frames_keep_their_order():
    clip = videomae_clip([np.full((9, 12, 3), value, np.uint8) for value in (3, 200, 90)], size=8)
    assert clip.shape == (3, 8, 8, 3) and clip[:, 0, 0, 0].tolist() == [3, 200, 90]


@pytest.mark.parametrize("wanted", [1, 4, 16])
def test_even_indices_are_spread_over_the_clip(wanted):
    for frames in range(wanted, 200):
        assert even_indices(frames, wanted) == [int(np.floor(i * frames / wanted)) for i in range(wanted)]


def test_short_clips_repeat_their_last_frame():
    assert even_indices(16) == list(range(16))
    assert even_indices(15) == [*range(15), 14]
    assert even_indices(3) == [0, 1, *[2] * 14]
    assert even_indices(1) == [0] * 16
    with pytest.raises(UserError, match="^clip: no frames; leave it out$"):
        even_indices(0)
