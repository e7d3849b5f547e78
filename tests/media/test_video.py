"""Frames of videos of every kind: by number, upright, in their colours, and the same wherever decoding begins."""

import os
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from emollama_jax.errors import UserError
from emollama_jax.media import container as media
from emollama_jax.media import video as video_module
from emollama_jax.media.images import to_rgb
from emollama_jax.media.video import Video
from tests.media.hostile import (
    MAKERS,
    NOISY,
    UNEVEN,
    grey,
    moving,
    one_frame,
    picture,
    pictures,
    write,
    write_hostile_files,
)

av = pytest.importorskip("av")

PLAIN = [
    *("one frame", "4k", "1 fps", "240 fps", "variable rate", "two hours, sparse", "portrait", "upside down"),
    *("held the other way", "wide pixels", "odd size", "10 bits", "full range", "grey", "with alpha", "interlaced"),
    *("edit list", "two videos", "cover", "mkv", "webm", "avi", "ts", "raw", "gif", "png named mp4", "palette", "jpg"),
    *("5.1", "no samples", "sound longer", "sound late", "video late", "spaces and 中文"),
]
"""Those of `pictures`."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_hostile_files(tmp_path_factory.mktemp("hostile"))


def shades(frames):
    """How bright each frame is where it is grey."""
    return [float(np.median(frame[frame.shape[0] // 2 :])) for frame in frames]


@pytest.mark.parametrize("name", MAKERS)
def test_every_file_gives_frames_or_one_line_that_says_why_not(files, name):
    file = files[name]
    if file.expected == "error":
        with pytest.raises(UserError, match=f"{file.path}.*; (check|copy|give|make) ") as caught:
            Video(file.path)
        assert "\n" not in str(caught.value)
        return
    with Video(file.path) as video:
        width, height = video.size
        assert video.size == file.size
        assert video.num_frames == len(video.times) >= 1
        assert video.times[0] == 0 and np.all(np.diff(video.times) > 0)
        assert video.duration >= video.times[-1]
        if file.frames is not None:
            assert video.num_frames == file.frames
        if file.seconds is not None:
            assert video.duration == pytest.approx(file.seconds, abs=0.001)
        last = video.num_frames - 1
        frames = list(video.frames([0, last // 2, last, last, last + 1000]))
    assert all(frame.shape == (height, width, 3) and frame.dtype == np.uint8 for frame in frames)
    assert np.array_equal(frames[2], frames[3]) and np.array_equal(frames[2], frames[4])
    assert np.array_equal(one_frame(file.path), frames[0])


@pytest.mark.parametrize("name", PLAIN)
def test_frames_come_in_order_upright_and_in_their_colours(files, name):
    with Video(files[name].path) as video:
        count = min(video.num_frames, 60)
        frames = list(video.frames(range(count)))
    first = 10 if name == "edit list" else 0  # so many are cut off
    assert shades(frames) == pytest.approx([grey(first + i) for i in range(count)], abs=5)
    if name == "grey":
        return
    height, width = frames[0].shape[:2]
    for frame in frames:
        corners = frame[height // 10, width // 10].astype(int), frame[height // 10, -width // 10].astype(int)
        assert corners[0] == pytest.approx([220, 20, 20], abs=25)
        assert corners[1] == pytest.approx([20, 20, 220], abs=25)


def test_times_are_those_at_which_frames_are_shown(files):
    times = {name: Video(files[name].path).times for name in ("variable rate", "1 fps", "240 fps", "gif", "avi", "raw")}
    assert times["variable rate"] == pytest.approx([UNEVEN(i) for i in range(20)], abs=1e-4)
    assert times["1 fps"].tolist() == [0, 1, 2, 3, 4]
    assert times["240 fps"] == pytest.approx(np.arange(60) / 240, abs=1e-9)
    assert times["gif"] == pytest.approx(np.arange(40) / 20, abs=1e-9)
    assert times["avi"] == pytest.approx(np.arange(25) / 25, abs=1e-9)
    assert times["raw"] == pytest.approx(np.arange(25) / 25, abs=1e-9)


# -- the same frames wherever decoding begins


@pytest.fixture
def fed(monkeypatch):
    """How many packets decoders are given."""
    count = [0]
    decode = media.decode

    def counting(stream, packets, strict=False):
        def counted():
            for packet in packets:
                count[0] += 1
                yield packet

        return decode(stream, counted(), strict)

    monkeypatch.setattr(video_module.media, "decode", counting)
    return count


OPEN = "keyint=40:bframes=3:scenecut=0:open-gop=1"
LONG = {
    "closed.mp4": {"options": {"preset": "fast", "g": "40"}},
    "open.mp4": {"options": {"preset": "fast", "x264-params": OPEN}},
    "open.ts": {"options": {"preset": "fast", "x264-params": OPEN}},
    "open 265.mkv": {
        "codec": "libx265",
        "options": {"preset": "fast", "x265-params": OPEN + ":min-keyint=40:log-level=none"},
    },
    "open.mpg": {"codec": "mpeg2video", "options": {"bf": "2", "g": "40", "sc_threshold": "1000000000"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "g": "40", "deadline": "realtime"}},
    "refreshed.ts": {"options": {"preset": "fast", "x264-params": "intra-refresh=1:keyint=20:scenecut=0"}},
    "every.mkv": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "uneven.mp4": {"options": {"preset": "fast", "g": "40"}, "stamps": UNEVEN},
    "reordered.avi": {"options": {"preset": "fast", "g": "40", "bf": "3"}},
}
SKIPS = {"closed.mp4", "open 265.mkv", "open.mpg", "vp9.webm", "every.mkv", "uneven.mp4"}
"""Those of which little is decoded. H.264 that leaves its groups open has references beyond the key frame, and AVI has
no times."""
PICKED = ([170], [0, 95], [3, 41, 90, 90, 91, 159, 500], [119, 120, 121], [40, 80, 160], list(range(0, 180, 36)))


@pytest.mark.parametrize("name", LONG)
def test_a_frame_does_not_depend_on_where_decoding_begins(tmp_path, fed, name):
    path = write(tmp_path / name, moving(180), **LONG[name])
    with Video(path) as video:
        assert video.num_frames == 180
        whole = list(video.frames(range(180)))
        fed[0] = 0
        assert np.array_equal(next(video.frames([170])), whole[170])
        assert (fed[0] < 60) == (name in SKIPS)
        for indices in PICKED:
            for index, frame in zip(indices, video.frames(indices), strict=True):
                assert np.array_equal(frame, whole[min(index, 179)]), index


@pytest.mark.parametrize("name", ["closed.mp4", "open.ts", "open.mpg", "vp9.webm"])
def test_what_is_only_marked_as_a_key_frame_is_no_place_to_begin(tmp_path, fed, name):
    path = write(tmp_path / name, moving(180), **LONG[name])
    with Video(path) as video:
        whole = list(video.frames(range(180)))
        video._keys = list(range(180))
        for indices in ([67, 115], [3, 170]):
            fed[0] = 0
            found = list(video.frames(indices))
            assert all(np.array_equal(frame, whole[index]) for index, frame in zip(indices, found, strict=True))
            assert fed[0] > indices[-1]


@pytest.mark.parametrize("name", ["closed.mp4", "open.mpg"])
def test_nor_is_what_is_damaged(tmp_path, name):
    whole = write(tmp_path / name, moving(180), **LONG[name]).read_bytes()
    path = tmp_path / f"damaged {name}"
    rng = np.random.default_rng(0)
    for _ in range(4):
        start, size = int(rng.integers(3000, len(whole) - 6000)), int(rng.integers(10, 3000))
        path.write_bytes(whole[:start] + rng.bytes(size) + whole[start + size :])
        with Video(path) as video:
            frames = list(video.frames(range(video.num_frames)))
            for index in range(45, video.num_frames, 20):
                assert np.array_equal(next(video.frames([index])), frames[index])


def test_a_picture_that_is_painted_over_is_decoded_from_the_start(tmp_path):
    images = [Image.fromarray(image) for image in moving(80, 32, 32)]
    for name in ("a.gif", "a.png"):
        images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=50)
        with Video(tmp_path / name) as video:
            whole = list(video.frames(range(80)))
            assert np.array_equal(next(video.frames([75])), whole[75])
    assert np.array_equal(whole[75], np.asarray(images[75]))


def test_a_pass_may_be_left_and_taken_again(files):
    with Video(files["mkv"].path) as video:
        first = next(video.frames([7]))
        assert list(video.frames([])) == []
        assert np.array_equal(next(video.frames([7])), first)
        for wrong in ([3, 2], [-1]):
            with pytest.raises(ValueError, match="ascending"):
                video.frames(wrong)


# -- damage


def test_of_a_damaged_video_what_can_be_decoded_is_used(files):
    with Video(files["damaged"].path) as video:
        found = shades(video.frames(range(60)))
        assert np.array_equal(next(video.frames([59])), list(video.frames([0, 30, 59]))[-1])
    assert len(found) == 60
    assert found[:15] == pytest.approx([grey(i) for i in range(15)], abs=5)
    with Video(files["cut in the middle"].path) as video:
        cut = shades(video.frames(range(60)))
        count = video.num_frames
    assert 10 < count < 60
    assert cut[: count - 3] == pytest.approx([grey(i) for i in range(count - 3)], abs=5)
    assert cut[count:] == [cut[count - 1]] * (60 - count)


def test_a_packet_that_cannot_be_decoded_shows_the_frame_before(tmp_path):
    """And shifts no number of those after it; before the first that can be decoded there is none to show."""
    path = write(tmp_path / "a.mov", pictures(20), codec="png", pixels="rgb24")
    data = bytearray(path.read_bytes())
    starts = [i for i in range(len(data)) if data.startswith(b"\x89PNG", i)]
    assert len(starts) == 20
    for number in (0, 1, 7, 19):
        data[starts[number] : starts[number] + 8] = bytes(8)
    path.write_bytes(data)
    with Video(path) as video:
        assert video.num_frames == 18
        shown = [2, 3, 4, 5, 6, 6, *range(8, 19), 18]
        assert shades(video.frames(range(18))) == [grey(i) for i in shown]
        assert shades(video.frames([5, 17])) == [grey(6), grey(18)]
        assert video.times[0] == 0 and video.timeline.origin == Fraction(2, 25)


def test_the_second_stream_is_taken_where_the_first_has_no_frame(tmp_path):
    path = tmp_path / "two.mov"
    with av.open(str(path), "w") as file:
        streams = [file.add_stream("png", rate=25) for _ in range(2)]
        for stream, side in zip(streams, (64, 32), strict=True):
            stream.width, stream.height, stream.pix_fmt = side, side, "rgb24"
        for stream in streams:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture(0, stream.width, stream.height))))
            file.mux(stream.encode(None))
    assert Video(path).size == (64, 64)
    path.write_bytes(path.read_bytes().replace(b"\x89PNG", bytes(4), 1))
    with Video(path) as video:
        assert video.size == (32, 32) and video.num_frames == 1


def test_a_single_picture_beside_a_video_is_its_cover(tmp_path):
    """Though it is larger, and not marked as a cover."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        video, cover = file.add_stream("ffv1", rate=25), file.add_stream("mjpeg", rate=25)
        for stream, size, form in ((video, (64, 48), "yuv444p"), (cover, (160, 120), "yuvj420p")):
            (stream.width, stream.height), stream.pix_fmt, stream.disposition = size, form, 0
        for stream, count in ((video, 10), (cover, 1)):
            for shown in pictures(count, stream.width, stream.height):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(shown)))
            file.mux(stream.encode(None))
    with Video(path) as video:
        assert video.size == (64, 48) and video.num_frames == 10


@pytest.mark.parametrize("name", ["mkv", "4k"])
def test_frames_that_are_too_large_are_refused(files, monkeypatch, name):
    monkeypatch.setattr(media, "MAX_PIXELS", 3000)
    with pytest.raises(UserError, match="over 0 million pixels; make it smaller$"):
        Video(files[name].path)


def test_a_file_that_may_not_be_read(files, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(av, "open", refuse)
    with pytest.raises(UserError, match="^may not be read: .*one.mp4; check its permissions$"):
        Video(files["one frame"].path)


def test_a_name_with_a_colon_is_no_address(files, tmp_path, monkeypatch):
    os.link(files["one frame"].path, tmp_path / "http:clip.mp4")
    monkeypatch.chdir(tmp_path)
    assert Video("http:clip.mp4").num_frames == 1


# -- how pictures are meant to be seen


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_photos_are_turned_upright_as_images_are(tmp_path, name, orientation):
    """All ways to hold a camera; PyAV cannot tell which photos are mirrored."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture(0, 60, 44)).save(tmp_path / name, exif=exif)
    expected = np.asarray(to_rgb(tmp_path / name)).astype(int)
    found = one_frame(tmp_path / name)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 2


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_videos_are_turned_and_mirrored_as_a_player_does(tmp_path, degrees, mirrored):
    """A selfie may be stored mirrored: by the file's matrix it is turned first, then mirrored."""
    upright = picture(0)
    stored = np.rot90(upright[:, ::-1] if mirrored else upright, -degrees // 90)
    path = write(tmp_path / "a.mp4", [stored], turn=degrees, mirrored=mirrored)
    assert np.abs(one_frame(path).astype(int) - upright).mean() < 2


@pytest.mark.parametrize("aspect, size", [((3, 2), (96, 48)), ((2, 3), (64, 72)), ((1, 1), (64, 48))])
@pytest.mark.parametrize("turn", [0, 90])
def test_pixels_become_square_and_none_is_lost(tmp_path, aspect, size, turn):
    def prepare(stream):
        stream.sample_aspect_ratio = Fraction(*aspect)

    with Video(write(tmp_path / "a.mp4", [picture(0)], turn=turn, prepare=prepare)) as video:
        assert video.size == (size[::-1] if turn else size)
        assert next(video.frames([0])).shape[:2] == video.size[::-1]


def test_a_change_of_size_on_the_way_gives_frames_of_one_size(tmp_path):
    for name, side in (("a.ts", 64), ("b.ts", 96)):
        write(tmp_path / name, pictures(10, side, side), stamps=lambda i, late=side > 64: i / 25 + 0.4 * late)
    both = tmp_path / "both.ts"
    both.write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    with Video(both) as video:
        frames = list(video.frames(range(video.num_frames)))
    assert {frame.shape for frame in frames} == {(64, 64, 3)} and len(frames) == 20
    assert shades(frames) == pytest.approx([grey(i % 10) for i in range(20)], abs=5)


@pytest.mark.parametrize("matrix, tag", [("ITU709", "bt709"), ("ITU601", "smpte170m")])
@pytest.mark.parametrize("span, full", [("MPEG", "off"), ("JPEG", "on")])
def test_colours_are_read_by_what_the_file_says_of_them(tmp_path, matrix, tag, span, full):
    colours = np.zeros((48, 64, 3), np.uint8)
    colours[:, :32], colours[:, 32:] = (200, 40, 60), (20, 180, 90)
    frame = av.VideoFrame.from_ndarray(colours, format="rgb24")
    frame = frame.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=span)
    frame.pts = 0
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        options = {"crf": "1", "x264-params": f"colormatrix={tag}:fullrange={full}"}
        stream = file.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    found = one_frame(tmp_path / "a.mp4").astype(int)
    assert found[24, 10] == pytest.approx([200, 40, 60], abs=6)
    assert found[24, 50] == pytest.approx([20, 180, 90], abs=6)


# -- against OpenCV, on real clips


def test_real_clips_are_as_opencv_reads_them(real_clips):
    cv2 = pytest.importorskip("cv2")
    for name, path in real_clips.items():
        capture = cv2.VideoCapture(str(path))
        with Video(path) as video:
            assert video.num_frames == int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
            assert video.duration == pytest.approx(video.num_frames / capture.get(cv2.CAP_PROP_FPS), abs=0.1)
            for number, frame in enumerate(video.frames(range(40))):
                assert capture.grab()
                if number % 8 == 0:
                    assert np.array_equal(frame, capture.retrieve()[1][:, :, ::-1]), (name, number)


def test_only_one_frame_is_kept(tmp_path):
    path = write(tmp_path / "a.mp4", pictures(60, 640, 480), options=NOISY)
    with Video(path) as video:
        tracemalloc.start()
        for _ in video.frames(range(60)):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 * 640 * 480 * 3
