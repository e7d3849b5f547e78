"""Videos as users have them, and files that are none: small ones, each wrong or rare in one way.

    files = write_hostile_files(tmp_path)                 # all of them, in some seconds
    files = write_hostile_files(tmp_path, "gif", "fifo")  # those
    files["gif"].path, files["gif"].frames

Every picture is grey, brighter from frame to frame, with a red corner at the top left and a blue one at the top right
of what is meant to be seen. Every sound is a tone.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from emollama_jax.media.container import import_av
from emollama_jax.media.video import Video

TONE = 440.0
RATE = 16000


class HostileFile(NamedTuple):
    path: Path
    frames: int | None
    """How many there are; None where it is some of them, 0 where reading a frame must be a `UserError`."""
    seconds: float | None = None
    """Of the pictures, where it is known."""
    size: tuple[int, int] = (64, 48)
    """(width, height), upright."""
    sound: float | None = None
    """Seconds of sound from the first frame on; None where there is none."""

    @property
    def expected(self) -> str:
        return "error" if self.frames == 0 else "frames"


class Sound(NamedTuple):
    samples: np.ndarray
    """[channels, S]"""
    rate: int = RATE
    start: float = 0.0
    """Seconds."""
    codec: str = "aac"
    layout: str = "mono"


def picture(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """The frame of a number, [height, width, 3]."""
    pixels = np.full((height, width, 3), grey(number), np.uint8)
    pixels[: height // 4, : width // 4] = (220, 20, 20)
    pixels[: height // 4, width - width // 4 :] = (20, 20, 220)
    return pixels


def moving(count: int, width: int = 64, height: int = 48) -> list[np.ndarray]:
    """Pictures of which every part changes."""
    noise = np.random.default_rng(0).integers(0, 90, (height, width, 3), np.uint8)
    return [picture(i, width, height) // 2 + np.roll(noise, (i, 2 * i), (0, 1)) for i in range(count)]


def grey(number: int) -> int:
    """How bright the picture of a number is; it repeats after 23."""
    return 30 + number % 23 * 8


def pictures(count: int, width: int = 64, height: int = 48) -> Iterator[np.ndarray]:
    return (picture(i, width, height) for i in range(count))


def faces(count: int) -> np.ndarray:
    """So many drawn faces on one picture of 160 x 120."""
    image = Image.new("RGB", (160, 120), (90, 120, 90))
    draw = ImageDraw.Draw(image)
    for i in range(count):
        x, y = 30 + 50 * i, 60
        draw.ellipse((x - 20, y - 26, x + 20, y + 26), fill=(224, 172, 140))
        for side in (-8, 8):
            draw.ellipse((x + side - 3, y - 9, x + side + 3, y - 5), fill=(40, 30, 30))
        draw.arc((x - 10, y + 2, x + 10, y + 16), 20, 160, fill=(150, 40, 40), width=2)
    return np.array(image)


def tone(seconds: float, rate: int = RATE, channels: int = 1) -> np.ndarray:
    """[channels, S]; a click at the start would be heard of every cut."""
    wave = 0.4 * np.sin(2 * np.pi * TONE * np.arange(round(seconds * rate)) / rate)
    return np.tile(wave.astype(np.float32), (channels, 1))


def write(
    path: Path,
    frames: Iterable[np.ndarray],
    *,
    rate: Fraction | int = 25,
    stamps: Callable[[int], float] | None = None,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    turn: int = 0,
    mirrored: bool = False,
    sound: Sound | None = None,
    options: dict[str, str] | None = None,
    container: str | None = None,
    container_options: dict[str, str] | None = None,
    prepare: Callable = lambda stream: None,
) -> Path:
    """Writes a video.

    Args:
        stamps: when the frame of a number is shown, in seconds; default by `rate`.
        turn: degrees counter-clockwise by which a player turns the pictures of an .mp4 or .mov.
        mirrored: whether it then mirrors them.
        prepare: is given the video stream, to set what has no argument here.
    """
    av = import_av()
    frames = iter(frames)
    first = next(frames, None)
    quick = {"preset": "ultrafast", "crf": "18"} if codec.startswith("libx26") else {}
    with av.open(str(path), "w", format=container, options=container_options or {}) as file:
        video = None
        if first is not None:
            video = file.add_stream(codec, rate=rate, options=quick | (options or {}))
            video.height, video.width = first.shape[:2]
            video.pix_fmt = pixels
            base = Fraction(1, 90000) if stamps else 1 / Fraction(rate)
            video.codec_context.time_base = base
            prepare(video)
        audio = None
        if sound is not None:
            audio = file.add_stream(sound.codec, rate=sound.rate, layout=sound.layout)
        for number, shown in enumerate([] if first is None else _chain(first, frames)):
            frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
            frame.time_base, frame.pts = base, round(stamps(number) / base) if stamps else number
            file.mux(video.encode(frame))
        if audio is not None and sound.samples.shape[1]:
            _encode_sound(file, audio, sound)
        for stream in filter(None, (video, audio)):
            if stream is video or sound.samples.shape[1]:
                file.mux(stream.encode(None))
    if turn or mirrored:
        _set_matrix(path, turn, mirrored)
    return path


def _set_matrix(path: Path, turn: int, mirrored: bool) -> None:
    """Writes how pictures are shown into the first track's header: ISO/IEC 14496-12, 8.3.2."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44
    cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][turn // 90]
    side = -1 if mirrored else 1
    matrix = np.array([side * cos, -sin, 0, side * sin, cos, 0, 0, 0, 2**14]) * 2**16
    data[start : start + 36] = matrix.astype(">i4").tobytes()
    path.write_bytes(data)


def _chain(first, rest):
    yield first
    yield from rest


def _encode_sound(file, stream, sound: Sound):
    av = import_av()
    form = stream.codec_context.format.name
    packed = av.AudioResampler(format=form, layout=sound.layout, rate=sound.rate)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound.samples), format="fltp", layout=sound.layout)
    frame.sample_rate, frame.pts = sound.rate, round(sound.start * sound.rate)
    frame.time_base = Fraction(1, sound.rate)
    for part in packed.resample(frame):
        file.mux(stream.encode(part))


def spoil(path: Path, kind: str) -> None:
    """Makes zeros of all packets of the first stream of a kind: video or audio."""
    with import_av().open(str(path)) as file:
        packets = [bytes(packet) for packet in file.demux(**{kind: 0}) if packet.size]
    data = path.read_bytes()
    for packet in packets:
        data = data.replace(packet, bytes(len(packet)), 1)
    path.write_bytes(data)


def write_hostile_files(folder: Path, *names: str) -> dict[str, HostileFile]:
    """Writes the files of these names, or all, into a folder, and says what each of them is."""
    folder.mkdir(parents=True, exist_ok=True)
    return {name: MAKERS[name](folder) for name in names or MAKERS}


def _video(
    filename: str,
    frames: Iterable[np.ndarray] | int = 25,
    *,
    size: tuple[int, int] = (64, 48),
    shown: tuple[int | None, float | None] | None = None,
    heard: float | None = None,
    **options,
) -> Callable[[Path], HostileFile]:
    """The maker of a video that can be read.

    Args:
        frames: so many of `pictures`, or these.
        size: of the upright pictures.
        shown: frames and seconds, where they are not those of 25 frames a second.
        heard: seconds of sound.
        options: of `write`.
    """

    def make(folder: Path) -> HostileFile:
        images = list(pictures(frames, *size)) if isinstance(frames, int) else list(frames)
        path = write(folder / filename, images, **options)
        count, seconds = shown or (len(images), len(images) / float(options.get("rate", 25)))
        return HostileFile(path, count, seconds, size, heard)

    return make


def _turned(filename: str, degrees: int) -> Callable[[Path], HostileFile]:
    """Filmed with the camera held another way."""
    stored = [np.rot90(image, -degrees // 90) for image in pictures(5)]
    return _video(filename, stored, turn=degrees)


def _no_video(filename: str, make: Callable[[Path], object], sound: float | None = None):
    def made(folder: Path) -> HostileFile:
        make(folder / filename)
        return HostileFile(folder / filename, 0, sound=sound)

    return made


def _cut(filename: str, part: float, frames: int | None):
    """The index stands in front, so that what is there can be read."""

    def make(folder: Path) -> HostileFile:
        path = write(folder / filename, pictures(60), container_options={"movflags": "faststart"}, options=NOISY)
        os.truncate(path, round(path.stat().st_size * part))
        return HostileFile(path, frames)

    return make


def _damaged(folder: Path) -> HostileFile:
    """The index says that all frames are there, and a sixth of the file is noise."""
    path = write(folder / "damaged.mp4", pictures(60), options=NOISY)
    data = bytearray(path.read_bytes())
    middle = slice(data.index(b"mdat") + 4 * len(data) // 12, data.index(b"mdat") + 6 * len(data) // 12)
    data[middle] = np.random.default_rng(0).bytes(len(data[middle]))
    path.write_bytes(data)
    return HostileFile(path, 60, 2.4)


def _two_videos(folder: Path) -> HostileFile:
    """The one that is not marked as default comes first and is larger."""
    av = import_av()
    path = folder / "two.mkv"
    with av.open(str(path), "w") as file:
        streams = [file.add_stream("ffv1", rate=25) for _ in range(2)]
        for stream, (width, height) in zip(streams, [(96, 80), (64, 48)], strict=True):
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        streams[0].disposition = 0
        streams[1].disposition = av.stream.Disposition.default.value
        for number in range(25):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(picture(number, stream.width, stream.height), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                file.mux(stream.encode(frame))
        for stream in streams:
            file.mux(stream.encode(None))
    return HostileFile(path, 25, 1.0)


def _cover(folder: Path, with_video: bool) -> HostileFile:
    """A picture of the album, larger than the video if there is one, beside a second of sound."""
    av = import_av()
    path = folder / ("cover.mp4" if with_video else "cover.m4a")
    with av.open(str(path), "w", format="mp4") as file:
        cover = file.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 160, 120, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic.value
        video = file.add_stream("libx264", rate=25) if with_video else None
        audio = file.add_stream("aac", rate=RATE, layout="mono")
        image = av.VideoFrame.from_ndarray(np.full((120, 160, 3), 255, np.uint8), format="rgb24")
        if video is not None:
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            for shown in pictures(25):
                file.mux(video.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
            file.mux(video.encode(None))
        file.mux(cover.encode(image))
        file.mux(cover.encode(None))
        _encode_sound(file, audio, Sound(tone(1)))
        file.mux(audio.encode(None))
    return HostileFile(path, 25 if with_video else 0, 1.0 if with_video else None, sound=1.0)


def _image(filename: str, image: Image.Image, format: str, **options) -> Callable[[Path], HostileFile]:
    def make(folder: Path) -> HostileFile:
        image.save(folder / filename, format=format, **options)
        return HostileFile(folder / filename, 1, size=image.size)

    return make


def _gif(folder: Path) -> HostileFile:
    first, *rest = (Image.fromarray(image) for image in pictures(40))
    first.save(folder / "animated.gif", save_all=True, append_images=rest, duration=50)
    return HostileFile(folder / "animated.gif", 40, 2.0)


def _wide_pixels(stream):
    stream.sample_aspect_ratio = Fraction(3, 2)


def _interlaced(stream):
    stream.codec_context.options = {"x264-params": "interlaced=1"}


NOISY = {"crf": "1"}  # large enough to be cut anywhere
UNEVEN = lambda number: number**2 / 100  # seconds; ever slower

MAKERS: dict[str, Callable[[Path], HostileFile]] = {
    "empty": _no_video("empty.mp4", lambda path: path.write_bytes(b"")),
    "text": _no_video("text.mp4", lambda path: path.write_text("This is no video.\n" * 50)),
    "notes": _no_video("notes.txt", lambda path: path.write_text("This is no video.\n" * 50)),
    "play list": _no_video("list.mp4", lambda path: path.write_text("ffconcat version 1.0\nfile one.mp4\n")),
    "noise": _no_video("noise.mp4", lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000))),
    "directory": _no_video("directory.mp4", os.mkdir),
    "dangling link": _no_video("link.mp4", lambda path: path.symlink_to("nowhere.mp4")),
    "fifo": _no_video("fifo.mp4", os.mkfifo),
    "cut in the header": _cut("header.mp4", 0.02, 0),
    "cut in the middle": _cut("middle.mp4", 0.6, None),
    "damaged": _damaged,
    "audio only": _no_video("audio.mp4", lambda path: write(path, [], sound=Sound(tone(1))), sound=1.0),
    "cover only": lambda folder: _cover(folder, with_video=False),
    "cover": lambda folder: _cover(folder, with_video=True),
    "too large": _no_video("large.png", lambda path: Image.new("1", (10001, 10000)).save(path)),
    "one frame": _video("one.mp4", 1),
    "black": _video("black.mp4", [np.zeros((48, 64, 3), np.uint8)] * 25),
    "no face": _video("no_face.mp4", [faces(0)] * 5, size=(160, 120), heard=None),
    "three faces": _video("three_faces.mp4", [faces(3)] * 5, size=(160, 120)),
    "4k": _video("4k.mp4", 3, size=(3840, 2160)),
    "1 fps": _video("1_fps.mp4", 5, rate=1),
    "240 fps": _video("240_fps.mp4", 60, rate=240),
    "variable rate": _video("variable.mp4", 20, stamps=UNEVEN, shown=(20, None)),
    "two hours, sparse": _video("sparse.mp4", 5, stamps=lambda number: 1800.0 * number, shown=(5, None)),
    "two hours": _video("two_hours.mp4", 7200, size=(32, 32), rate=1),
    "portrait": _turned("portrait.mp4", 90),
    "upside down": _turned("upside_down.mp4", 180),
    "held the other way": _turned("turned.mov", 270),
    "wide pixels": _video("wide.mp4", list(pictures(5)), size=(96, 48), prepare=_wide_pixels),
    "odd size": _video("odd.mp4", 5, size=(63, 47), pixels="yuv444p"),
    "10 bits": _video("10_bits.mp4", 5, codec="libx265", pixels="yuv420p10le", options={"x265-params": "log-level=0"}),
    "full range": _video("full_range.mkv", 5, codec="mjpeg", pixels="yuvj420p"),
    "grey": _video("grey.mkv", 5, codec="ffv1", pixels="gray"),
    "with alpha": _video("alpha.mov", 5, codec="png", pixels="rgba"),
    "interlaced": _video("interlaced.mp4", 10, prepare=_interlaced),
    "edit list": _video("edited.mp4", 25, stamps=lambda number: number / 25 - 0.4, shown=(15, 0.6)),
    "two videos": _two_videos,
    "mkv": _video("a.mkv", heard=1.0, sound=Sound(tone(1), codec="pcm_s16le")),
    "webm": _video("a.webm", heard=1.0, codec="libvpx", sound=Sound(tone(1), codec="libopus")),
    "avi": _video("a.avi", heard=1.0, options={"bf": "2", "preset": "fast"}, sound=Sound(tone(1), codec="pcm_s16le")),
    # The encoder of mp2 leaves out what does not fill a packet.
    "ts": _video("a.ts", heard=0.978, options={"bf": "2", "preset": "fast"}, sound=Sound(tone(1), codec="mp2")),
    "raw": _video("a.h264", options={"bf": "2", "preset": "fast"}),
    "gif": _gif,
    "png named mp4": _image("png.mp4", Image.fromarray(picture(0)), "PNG"),
    "palette": _image("palette.png", Image.fromarray(picture(0)).quantize(8), "PNG"),
    "jpg": _image("a.jpg", Image.fromarray(picture(0)), "JPEG", quality=95),
    "5.1": _video("51.mp4", heard=1.0, sound=Sound(tone(1, 48000, 6), 48000, layout="5.1")),
    "8 kHz": _video("8_khz.mp4", heard=1.0, sound=Sound(tone(1, 8000), 8000)),
    "silence": _video("silence.mp4", heard=1.0, sound=Sound(tone(1) * 0)),
    "no samples": _video("no_samples.mp4", 5, sound=Sound(tone(0))),
    "sound longer": _video("sound_longer.mp4", 5, heard=2.0, sound=Sound(tone(2))),
    "sound late": _video("sound_late.mp4", heard=1.5, sound=Sound(tone(1), start=0.5)),
    "video late": _video(
        "video_late.mp4", stamps=lambda n: n / 25 + 0.4, shown=(25, 1.0), heard=0.6, sound=Sound(tone(1))
    ),
    "spaces and 中文": _video("a clip, 100% 开心: 我的 视频.mp4", 5),
}


def one_frame(path, index: int = 0) -> np.ndarray:
    """A frame of a video, as `Video` gives it."""
    with Video(path) as video:
        return next(video.frames([index]))
