"""Recordings as cameras and tuners leave them: joined as files are, or cut anywhere."""

import numpy as np
import pytest

from emollama_jax.errors import UserError
from emollama_jax.media.audio import read_sound
from emollama_jax.media.video import Video
from tests.media.hostile import RATE, Sound, moving, tone, write

pytest.importorskip("av")


def write_recording(path, count=25, key_every=250):
    """A transport stream with a click of sound at every second."""
    sound = np.zeros((1, count * RATE // 25), np.float32)
    sound[:, np.arange(0, sound.shape[1], RATE)[:, None] + np.arange(800)] = tone(0.05)
    options = {"preset": "fast", "crf": "1", "x264-params": f"keyint={key_every}:scenecut=0"}
    return write(path, moving(count), options=options, sound=Sound(sound, codec="mp2"))


def test_recordings_that_are_joined_follow_on(tmp_path):
    """The clock starts again in the middle of the file, in pictures and sound."""
    one = write_recording(tmp_path / "one.ts").read_bytes()
    path = tmp_path / "both.ts"
    path.write_bytes(one + one)
    with Video(tmp_path / "one.ts") as video:
        whole = list(video.frames(range(25)))
    with Video(path) as video:
        assert video.num_frames == 50
        assert np.all(np.diff(video.times) > 0.03) and video.duration == pytest.approx(2, abs=0.1)
        for number, frame in enumerate(video.frames(range(50))):
            assert np.array_equal(frame, whole[number % 25])
        second, timeline = video.times[25], video.timeline
    sound = read_sound(path, timeline=timeline)
    loud = np.flatnonzero(np.abs(sound) > 0.2) / RATE
    assert len(sound) / RATE == pytest.approx(2, abs=0.1)
    assert loud[0] < 0.02 and loud[loud > 0.5][0] == pytest.approx(second, abs=0.02)


def test_what_comes_before_the_first_key_frame_is_not_there(tmp_path):
    """Neither as frames nor as time: the sound begins with the first picture."""
    whole = write_recording(tmp_path / "whole.ts", 75, key_every=20).read_bytes()
    path = tmp_path / "cut.ts"
    path.write_bytes(whole[len(whole) // 10 // 188 * 188 :])  # within the first 20 frames
    with Video(tmp_path / "whole.ts") as video:
        expected = list(video.frames(range(20, 75)))
    with Video(path) as video:
        assert video.num_frames == 55 and video.times[-1] == pytest.approx(54 / 25)
        assert all(np.array_equal(*pair) for pair in zip(video.frames(range(55)), expected, strict=True))
    loud = np.flatnonzero(np.abs(read_sound(path)) > 0.2) / RATE
    assert loud[0] == pytest.approx(0.2, abs=0.01)  # the click at 1 s, 20 frames on


def test_a_recording_without_a_key_frame_says_so(tmp_path):
    whole = write_recording(tmp_path / "whole.ts").read_bytes()
    path = tmp_path / "cut.ts"
    path.write_bytes(whole[len(whole) // 2 // 188 * 188 :])
    with pytest.raises(UserError, match="cut.ts: no key frame, .* cut the clip so that it begins with one"):
        Video(path)
