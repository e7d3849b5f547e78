"""What a file is, told by its first bytes, whatever it is called."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from emollama_jax.media.kinds import HEAD, kind_of
from tests.media import hostile

CODECS = {"webm": "libvpx", "mpg": "mpeg2video", "avi": "mpeg4", "flv": "flv1", "asf": "mpeg4"}
SOUNDS = (b"RIFF\0\0\0\0WAVE", b"ID3\x04", b"\xff\xfb\x90", b"fLaC", b"FORM\0\0\0\0AIFF", b"\0\0\0\x20ftypM4A ")
OTHERS = (b"", b"PK\x03\x04", b"\x1f\x8b", b"#EXTM3U", b"<svg", b"%PDF", b"RIFF\0\0\0\0ACON", b"GIF", bytes(500))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "avi", "mov", "ts", "flv", "mpg", "asf"])
def test_videos(tmp_path, suffix):
    pytest.importorskip("av")
    codec = {"webm": "libvpx", "mpg": "mpeg2video", "avi": "mpeg4", "flv": "flv1", "asf": "mpeg4"}.get(
        suffix, "libx264"
    )
    try:
        path = hostile.write(tmp_path / f"clip.{suffix}", hostile.pictures(4), codec=codec)
    except Exception as error:  # of a build of FFmpeg without the codec
        pytest.skip(f"no {codec}: {error}")
    assert kind_of(path.read_bytes()[:HEAD]) == "video"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_pictures(format):
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, format)
    assert kind_of(file.getvalue()) == "image"


def test_sounds_and_what_is_none():
    for head in (
        b"RIFF\0\0\0\0WAVEfmt ",
        b"ID3\x04",
        b"\xff\xfb\x90",
        b"fLaC",
        b"FORM\0\0\0\0AIFF",
        b"\0\0\0\x20ftypM4A ",
    ):
        assert kind_of(head) == "audio", head
    for head in (
        b"",
        b"PK\x03\x04",
        b"\x1f\x8b",
        b"#EXTM3U",
        b"<svg",
        b"%PDF",
        b"RIFF\0\0\0\0ACON",
        b"G" * 10,
        bytes(500),
    ):
        assert kind_of(head) == "", head
    packets = b"".join(b"\x47" + struct.pack(">I", i) + bytes(183) for i in range(5))
    assert kind_of(packets) == "video" and kind_of(bytes(4) + packets[:188]) == ""
