"""A video as the encoders take it: one frame, the face through the clip, the motion, and the sound.

Axes: I x J pixels, F faces, t frames, S samples.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from emollama_jax.errors import UserError
from emollama_jax.fields import check_fields, field
from emollama_jax.io.stopwatch import Stopwatch
from emollama_jax.media.audio import hubert_waveform, is_silent, read_sound
from emollama_jax.media.container import DecodeError
from emollama_jax.media.face_mesh import load_mesh
from emollama_jax.media.faces import face_crops
from emollama_jax.media.images import eva_vit_frame, even_indices, mae_face, videomae_clip
from emollama_jax.media.peak import motion_peak, openface_peak
from emollama_jax.media.timeline import Timeline
from emollama_jax.media.video import Video

FRAME_RULES = ("first", "middle", "peak")
LONGEST = 128.0  # seconds; the longest sound that HuBERT is compiled for
MIN_SAMPLES = 400  # of one frame of HuBERT's
SOUND_SLACK = 1.0  # seconds by which the sound may outlast the longest clip, and is cut: the last packet of a codec


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipConfig:
    """How videos are read."""

    max_seconds: float = field(120.0, gt=0, le=LONGEST)
    """The longest clip; a longer one is put aside, to be cut."""
    max_faces: int = field(256, ge=1)
    """Frames in which the face is looked for, evenly over the clip where it has more. The peak is one of them."""
    mesh: str = ""
    """MediaPipe's face_landmarker.task (`emollama fetch face-landmarker`), which tells faces from what is none and
    people from pictures, and finds faces where there is no other detector, as on ARM; empty does without. Needs the
    extra `mesh`."""
    person: int = field(1, ge=1)
    """Whose face is looked at, of several: 1 the main one, which is large and sure for long, 2 the next."""

    def __post_init__(self):
        check_fields(self)


class ReadSpec(NamedTuple):
    """What is read of a clip, in the sizes that the encoders take; None is left out."""

    frame: int | None = 448
    face: int | None = 224
    motion: tuple[int, int] | None = (16, 224)
    """(frames, pixels)."""
    sound: bool = True


class ClipRequest(NamedTuple):
    """A clip to be read, and what its annotations say about it."""

    name: str
    video: Path | None
    subtitle: str = ""
    peak_index: int | None = None
    """The number of the peak frame, from 0."""
    openface: Path | None = None
    """OpenFace's CSV file of the video, for the peak frame where none is listed."""
    sound: Path | None = None
    """A file with the clip's sound, in place of the video's own; without a video the clip is heard alone."""


@dataclass(frozen=True)
class ClipMedia:
    """What was read of a clip. What the `ReadSpec` leaves out is None; so is the sound where there is none, and the
    faces and the motion where only the sound can be decoded: the frame is black then."""

    frame: UInt8[np.ndarray, "I I 3"] | None
    faces: UInt8[np.ndarray, "F J J 3"] | None
    motion: UInt8[np.ndarray, "t J J 3"] | None
    waveform: Float[np.ndarray, " S"] | None
    clip_info: dict[str, Any] = dataclasses.field(default_factory=dict)
    """For people, in JSON's types: `frames`, `seconds`, `sound_seconds`, `frame` (the one that was taken), and, of the
    face, in how many frames it was found (`faces_found`) and looked for (`faces_looked_for`) and what the `crops` show
    (see `FaceCrops.source`), and where it is in the frame, or the one nearest to it (`face_box`: x, y, width, height in
    parts of the frame); in `notes` what could not be read, and what was taken in its place."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Time taken by `decode`, `face` and `sound`."""
    span: tuple[float, float] | None = None
    """When the clip begins by the clock of its file, and how long it lasts, in seconds; None of a still."""
    face_index: int = 0
    """Which of the faces is the one in the frame, or nearest to it."""

    def note(self, *notes: str) -> None:
        """Add to the notes of `clip_info`."""
        if notes:
            self.clip_info["notes"] = [*self.clip_info.get("notes", ()), *notes]


def read_clip(
    request: ClipRequest, config: ClipConfig | None, spec: ReadSpec, *, frame_rule: str = "first"
) -> ClipMedia:
    """Reads a clip.

    The peak frame is the one that is listed, else that of OpenFace's action units, else the one in which the face
    moves most. Where either the pictures or the sound cannot be decoded, the other is read, and a note says so.

    Args:
        config: None reads a single frame of a clip of any length, and does not look for its peak.
        frame_rule: which frame: first, middle, peak, or a number from 0.

    Raises:
        UserError: there is no video, nothing of it can be read, it is too long, or its peak is not known.
    """
    if (path := request.video) is None and request.sound is None:
        raise UserError(f"clip {request.name} has no video; put it into the folder of videos")
    peak_index = _known_peak(request, config) if spec.frame is not None and frame_rule == "peak" else None
    clock, timeline, times, failed = Stopwatch(), None, (0.0, 0.0), None
    try:
        if path is None:
            media = _no_pictures(spec)
        else:
            with Video(path) as video:
                timeline, times = video.timeline, (float(video.timeline.origin), video.duration)
                media = _read_pictures(request, video, config, spec, frame_rule, peak_index, clock)
    except DecodeError as error:
        if not spec.sound:
            raise
        media, failed, times = _no_pictures(spec), error, (0.0, 0.0)
    if request.sound is not None:
        path, timeline = request.sound, None
    with clock("sound"):
        sound = _read_sound(path, config, timeline, media, failed) if spec.sound else None
    if request.video is None and sound is None:
        reason = "; ".join(media.clip_info.get("notes", ())) or "it is not listened to"
        raise UserError(f"{path}: nothing to be heard ({reason}); give a video, or another sound")
    if failed is not None:
        if sound is None:
            raise failed
        media.note(f"its pictures cannot be decoded ({failed}): a black frame stands for them")
    begin, duration = times
    duration = max(duration, media.clip_info.get("sound_seconds", 0))
    span = (begin, duration) if media.clip_info["frames"] > 1 or sound is not None else None
    return dataclasses.replace(media, waveform=sound, seconds=clock.seconds, span=span)


def _known_peak(request: ClipRequest, config: ClipConfig | None) -> int | None:
    """The peak frame that is listed or measured; None is to be looked for. Raises UserError where that cannot be."""
    if request.peak_index is not None:
        return request.peak_index
    if request.openface is not None:
        return openface_peak(request.openface, config.person if config is not None else 1)
    if config is None:
        raise UserError(
            f"clip {request.name} has no peak frame; take another frame rule, or emollama extract to find it"
        )
    return None


def _read_pictures(
    request: ClipRequest,
    video: Video,
    config: ClipConfig | None,
    spec: ReadSpec,
    frame_rule: str,
    peak_index: int | None,
    clock: Stopwatch,
) -> ClipMedia:
    """Read the clip but for its sound. Raises UserError."""
    looks_for_peak = spec.frame is not None and frame_rule == "peak" and peak_index is None
    clip_info: dict[str, Any] = {"frames": video.num_frames, "seconds": round(video.duration, 3)}
    if peak_index is not None and peak_index >= video.num_frames:
        last = video.num_frames - 1
        raise UserError(f"{request.video}: the peak frame {peak_index} is beyond the last, {last}; mend or remove it")
    if config is not None and video.duration > config.max_seconds:
        raise _too_long(request.video, f"{video.duration:.0f} s", config)
    crops = None
    with clock("face"):
        if spec.face is not None or looks_for_peak:
            looked_at = even_indices(video.num_frames, min(config.max_faces, video.num_frames))
            mesh = load_mesh(config.mesh) if config.mesh else None
            crops = face_crops(video, looked_at, mesh=mesh, person=config.person)
            clip_info |= {"faces_found": int(crops.found.sum()), "faces_looked_for": crops.looked_for}
            clip_info["crops"] = crops.source
    with clock("decode"):
        if looks_for_peak:
            peak_index = motion_peak(crops)
        picked = frame_index(frame_rule, video.num_frames, peak_index)
        images = _read_frames(video, spec, picked)
    if spec.frame is not None:
        clip_info["frame"] = picked
    face_index = 0 if crops is None else int(np.abs(crops.indices - picked).argmin())
    if crops is not None and crops.source == "face":
        box = crops.boxes[face_index] / np.tile(video.size, 2)
        clip_info["face_box"] = [round(float(value), 3) for value in box]
    faces = np.stack([mae_face(crop, spec.face) for crop in crops.crops]) if spec.face is not None else None
    return ClipMedia(images.get("frame"), faces, images.get("motion"), None, clip_info, face_index=face_index)


def _no_pictures(spec: ReadSpec) -> ClipMedia:
    frame = np.zeros((spec.frame, spec.frame, 3), np.uint8) if spec.frame is not None else None
    return ClipMedia(frame, None, None, None, {"frames": 0, "seconds": 0.0})


def _read_sound(
    path: Path, config: ClipConfig, timeline: Timeline | None, media: ClipMedia, failed: DecodeError | None
) -> Float[np.ndarray, " S"] | None:
    """The waveform of a clip, whose length is written into `media`; None, and a note, where there is none to hear.

    Raises:
        UserError: it is too long.
    """
    try:
        sound = read_sound(path, config.max_seconds + SOUND_SLACK, timeline)
        if sound is None or is_silent(sound):
            media.note(*(["its sound is digital silence"] if sound is not None else []))
            return None
        waveform = hubert_waveform(sound[: round(config.max_seconds * 16000)], 16000, str(path))
    except (UserError, MemoryError) as error:
        if failed is None:
            media.note(f"its sound cannot be decoded ({error or 'it does not fit into the memory'})")
        return None
    if len(sound) >= round((config.max_seconds + SOUND_SLACK) * 16000):
        raise _too_long(path, f"more than {len(sound) / 16000 - 1:.0f} s of sound", config)
    media.clip_info["sound_seconds"] = round(len(sound) / 16000, 3)
    if len(waveform) < MIN_SAMPLES:
        media.note(f"its sound is shorter than one frame of the encoder, {MIN_SAMPLES / 16:g} ms")
        return None
    return waveform


def _too_long(path: Path, length: str, config: ClipConfig) -> UserError:
    return UserError(f"{path}: {length}, more than clip.max_seconds={config.max_seconds:g}; cut it into clips")


def check_frame_rule(rule: str) -> str:
    """Return the rule. Raises UserError for one that is none of FRAME_RULES nor a number from 0."""
    if rule not in FRAME_RULES and not rule.isdecimal():
        raise UserError(f"frame rule {rule!r}: give {', '.join(FRAME_RULES)} or a frame's number from 0")
    return rule


def frame_index(rule: str, num_frames: int, peak_index: int | None = None) -> int:
    """Return the number of the frame that a rule means: first, middle, peak, or a number; at most the last one's."""
    index = {"first": 0, "middle": num_frames // 2, "peak": peak_index}[rule] if rule in FRAME_RULES else int(rule)
    return min(index, num_frames - 1)


def _read_frames(video: Video, spec: ReadSpec, picked: int) -> dict[str, np.ndarray]:
    """Return the frame and the motion, read in one pass over the video."""
    motion = even_indices(video.num_frames, spec.motion[0]) if spec.motion else []
    numbers = sorted({*motion, *([picked] if spec.frame is not None else [])})
    images, shown = {}, {}
    for number, pixels in zip(numbers, video.frames(numbers), strict=True):
        if number == picked and spec.frame is not None:
            images["frame"] = eva_vit_frame(pixels, spec.frame)
        if number in motion:
            shown[number] = videomae_clip([pixels], spec.motion[1])[0]
    if motion:
        images["motion"] = np.stack([shown[number] for number in motion])
    return images
