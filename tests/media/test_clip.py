"""What of a clip is read where a part of it cannot be, and what is said of that."""

import numpy as np
import pytest

from emollama_jax.errors import UserError
from emollama_jax.media.clip import ClipConfig, ClipRequest, ReadSpec, read_clip
from tests.media.hostile import Sound, pictures, spoil, tone, write

pytest.importorskip("av")

CONFIG = ClipConfig(max_seconds=2.0, max_faces=2)
SPEC = ReadSpec(32, 32, (2, 32))


def read(path, spec=SPEC):
    return read_clip(ClipRequest("a", path), CONFIG, spec)


def test_sound_that_cannot_be_decoded_leaves_the_pictures(tmp_path):
    path = write(tmp_path / "a.mkv", pictures(10), sound=Sound(tone(0.4), codec="flac"))
    spoil(path, "audio")
    media = read(path)
    assert media.waveform is None and media.faces.shape == (2, 32, 32, 3) and media.frame.any()
    assert media.clip_info["notes"] == [
        f"its sound cannot be decoded (not a video, or damaged or cut short: {path}; copy it again or leave it out)"
    ]
    assert media.span == (0.0, pytest.approx(0.4))


def test_pictures_that_cannot_be_decoded_leave_the_sound(tmp_path):
    path = write(tmp_path / "a.mkv", pictures(10), codec="ffv1", pixels="yuv444p", sound=Sound(tone(0.4), codec="flac"))
    spoil(path, "video")
    media = read(path)
    assert len(media.waveform) == pytest.approx(6400, abs=20) and media.faces is None and media.motion is None
    assert media.frame.shape == (32, 32, 3) and not media.frame.any()
    (note,) = media.clip_info["notes"]
    assert note.startswith("its pictures cannot be decoded (not a video, or damaged") and "black frame" in note
    with pytest.raises(UserError, match="^not a video, or damaged"):
        read(path, SPEC._replace(sound=False))
    spoil(path, "audio")
    with pytest.raises(UserError, match="^not a video, or damaged"):
        read(path)


def test_silence_is_no_sound_and_is_told(tmp_path):
    media = read(write(tmp_path / "a.mp4", pictures(10), sound=Sound(0 * tone(0.4))))
    assert media.waveform is None and media.clip_info["notes"] == ["its sound is digital silence"]
    assert "sound_seconds" not in media.clip_info


def test_a_short_picture_with_a_long_sound_is_too_long(tmp_path):
    sound = lambda seconds: Sound(tone(seconds), codec="pcm_s16le")
    path = write(tmp_path / "long.mkv", pictures(1), sound=sound(3.5))
    with pytest.raises(UserError, match="long.mkv: more than 2 s of sound, more than clip.max_seconds=2; cut it into"):
        read(path)
    media = read(write(tmp_path / "short.mkv", pictures(1), sound=sound(2.1)))  # as the last packet of a codec may be
    assert len(media.waveform) == 32000 and media.span == (0.0, pytest.approx(2.1))


def test_a_still_has_no_span(tmp_path):
    assert read(write(tmp_path / "a.mkv", pictures(1))).span is None


def test_a_peak_beyond_the_last_frame_is_named(tmp_path):
    path = write(tmp_path / "a.mkv", pictures(10))
    asked = lambda index: read_clip(ClipRequest("a", path, peak_index=index), CONFIG, SPEC, frame_rule="peak")
    assert asked(9).clip_info["frame"] == 9
    with pytest.raises(UserError, match="a.mkv: the peak frame 10 is beyond the last, 9; mend or remove it"):
        asked(10)
    assert read_clip(ClipRequest("a", path, peak_index=10), CONFIG, SPEC).clip_info["frame"] == 0  # not asked for


def test_a_sound_of_its_own_takes_the_place_of_the_videos(tmp_path):
    picture = write(tmp_path / "a.mp4", pictures(5))
    sound = write(tmp_path / "b.mp4", pictures(5), sound=Sound(tone(0.5)))
    both = read_clip(ClipRequest("a", picture, sound=sound), CONFIG, ReadSpec(face=None))
    assert both.clip_info["frames"] == 5 and both.clip_info["sound_seconds"] == pytest.approx(0.5, abs=0.1)
    alone = read_clip(ClipRequest("a", None, sound=sound), CONFIG, ReadSpec(face=None))
    assert alone.clip_info["frames"] == 0 and not alone.frame.any()
    np.testing.assert_array_equal(alone.waveform, both.waveform)
    with pytest.raises(UserError, match="nothing to be heard"):
        read_clip(ClipRequest("a", None, sound=picture), CONFIG, ReadSpec(face=None))


def test_the_face_that_is_meant_is_said(real_clips):
    config = ClipConfig(max_seconds=20.0, max_faces=3)
    media = read_clip(ClipRequest("a", real_clips["obama_speech"]), config, ReadSpec(frame=64), frame_rule="middle")
    x, y, width, height = media.clip_info["face_box"]
    assert 0 < x < x + width < 1 and 0 < y < y + height < 1 and 0 <= media.face_index < len(media.faces)
