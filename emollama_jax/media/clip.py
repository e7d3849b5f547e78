"""A video as the encoders take it: one frame, the face through the clip, the motion, and the sound.

Axes: I x J pixels, F faces, t frames, S samples.
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from emollama_jax.errors import UserError
from emollama_jax.fields import check_fields, field
from emollama_jax.media.audio import hubert_waveform, read_sound
from emollama_jax.media.faces import face_crops
from emollama_jax.media.images import eva_vit_frame, even_indices, mae_face, videomae_clip
from emollama_jax.media.peak import motion_peak
from emollama_jax.media.video import Video

FRAME_RULES = ("first", "middle", "peak")
LONGEST = 128.0  # seconds; the longest sound that HuBERT is compiled for
MIN_SAMPLES = 400  # of one frame of HuBERT's


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipConfig:
    """How videos are read."""

    max_seconds: float = field(120.0, gt=0, le=LONGEST)
    """The longest clip; a longer one is put aside, to be cut."""
    max_faces: int = field(256, ge=1)
    """Frames in which the face is looked for, evenly over the clip where it has more. The peak is one of them."""

    def __post_init__(self):
        check_fields(self)


class ReadSpec(NamedTuple):
    """What of a clip is read, in the sizes that the encoders take; None is not."""

    frame: int | None = 448
    face: int | None = 224
    motion: tuple[int, int] | None = (16, 224)
    """(frames, pixels)."""
    sound: bool = True


@dataclass(frozen=True)
class ClipMedia:
    """What was read of a clip. What was not wanted is None; so is the sound where there is none."""

    frame: UInt8[np.ndarray, "I I 3"] | None
    faces: UInt8[np.ndarray, "F J J 3"] | None
    motion: UInt8[np.ndarray, "t J J 3"] | None
    waveform: Float[np.ndarray, " S"] | None
    clip_info: dict[str, Any] = dataclasses.field(default_factory=dict)
    """For people, in JSON's types: `frames`, `seconds`, `sound_seconds`, `frame` (the one that was taken), and, of the
    face, in how many frames it was found (`faces_found`) and looked for (`faces_looked_for`) and what the `crops` show
    (see `FaceCrops.source`)."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Time taken by `decode`, `face` and `sound`."""


def read_clip(
    path: str | Path,
    config: ClipConfig,
    wanted: ReadSpec,
    *,
    frame: str = "first",
    peak_index: int | None = None,
) -> ClipMedia:
    """Reads a clip.

    Args:
        frame: which one: first, middle, peak, or a number from 0.
        peak_index: the number of the peak frame where it is known; else it is the one in which the face moves most.

    Raises:
        UserError: the video cannot be read, has no frame, or is too long.
    """
    clock = _Clock()
    with Video(path) as video:
        clip_info: dict[str, Any] = {"frames": video.num_frames, "seconds": round(video.duration, 3)}
        if video.duration > config.max_seconds:
            raise UserError(
                f"{path}: {video.duration:.0f} s, more than clip.max_seconds={config.max_seconds:g}; cut it into clips"
            )
        looks_for_peak = wanted.frame is not None and frame == "peak" and peak_index is None
        crops = None
        with clock("face"):
            if wanted.face is not None or looks_for_peak:
                crops = face_crops(video, even_indices(video.num_frames, min(config.max_faces, video.num_frames)))
                clip_info |= {"faces_found": int(crops.found.sum()), "faces_looked_for": crops.looked_for}
                clip_info["crops"] = crops.source
        with clock("decode"):
            if looks_for_peak:
                peak_index = motion_peak(crops)
            picked = frame_index(frame, video.num_frames, peak_index)
            images = _read_frames(video, wanted, picked)
        if wanted.frame is not None:
            clip_info["frame"] = picked
    waveform = None
    with clock("sound"):
        if wanted.sound and (sound := read_sound(path, config.max_seconds)) is not None:
            clip_info["sound_seconds"] = round(len(sound) / 16000, 3)
            waveform = hubert_waveform(sound, 16000, str(path)) if len(sound) >= MIN_SAMPLES else None
    faces = np.stack([mae_face(crop, wanted.face) for crop in crops.crops]) if wanted.face is not None else None
    return ClipMedia(images.get("frame"), faces, images.get("motion"), waveform, clip_info, clock.seconds)


def frame_index(rule: str, num_frames: int, peak_index: int | None = None) -> int:
    """The number of the frame that a rule means: first, middle, peak, or a number from 0; at most the last one's."""
    index = {"first": 0, "middle": num_frames // 2, "peak": peak_index}[rule] if rule in FRAME_RULES else int(rule)
    return min(index, num_frames - 1)


def _read_frames(video: Video, wanted: ReadSpec, picked: int) -> dict[str, np.ndarray]:
    """The frame and the motion, by one pass over the video."""
    motion = even_indices(video.num_frames, wanted.motion[0]) if wanted.motion else []
    numbers = sorted({*motion, *([picked] if wanted.frame is not None else [])})
    images, shown = {}, {}
    for number, pixels in zip(numbers, video.frames(numbers), strict=True):
        if number == picked and wanted.frame is not None:
            images["frame"] = eva_vit_frame(pixels, wanted.frame)
        if number in motion:
            shown[number] = videomae_clip([pixels], wanted.motion[1])[0]
    if motion:
        images["motion"] = np.stack([shown[number] for number in motion])
    return images


class _Clock:
    """Adds up the seconds that named blocks take."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> "_Clock":
        self._name = name
        return self

    def __enter__(self):
        self._start = time.perf_counter()

    def __exit__(self, *error):
        taken = time.perf_counter() - self._start
        self.seconds[self._name] = self.seconds.get(self._name, 0) + taken
