"""Encoded clips that are kept for follow-up questions, in bounded memory."""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from emollama_jax.infer.clip_input import ClipInput


@dataclass(frozen=True)
class Seen:
    """What people are shown of a clip, beside its frame: see `media.clip.ClipMedia`."""

    face: UInt8[np.ndarray, "J J 3"] | None
    envelope: Float[np.ndarray, "W 2"] | None
    """The least and the greatest of the waveform in W equal parts."""


@dataclass(frozen=True, eq=False)
class EncodedClip:
    """A clip after the encoders: on the host, without its file.

    Attributes:
        clip: with the words that its file has.
        clip_info: see `ItemRead`.
        soft: its soft tokens f32 [S, D] by the modalities in use; filled as they are asked for.
    """

    clip: ClipInput
    clip_info: dict[str, Any]
    seen: Seen
    soft: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        arrays = [self.clip.frame, self.clip.features, self.seen.face, self.seen.envelope]
        return sum(array.nbytes for array in (*arrays, *self.soft.values()) if array is not None)


class ClipCache:
    """The clips that were asked about last, by the content of their files; for several threads."""

    def __init__(self, limit: int):
        """`limit`: bytes."""
        self._limit, self._lock = limit, threading.Lock()
        self._clips: OrderedDict[str, EncodedClip] = OrderedDict()

    def get(self, key: str) -> EncodedClip | None:
        with self._lock:
            if key in self._clips:
                self._clips.move_to_end(key)
            return self._clips.get(key)

    def put(self, key: str, clip: EncodedClip) -> None:
        """Keep a clip, or one that has grown, and drop those that were asked about longest ago."""
        with self._lock:
            self._clips[key] = clip
            self._clips.move_to_end(key)
            total = sum(one.nbytes for one in self._clips.values())
            while total > self._limit:
                total -= self._clips.popitem(last=False)[1].nbytes

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(one.nbytes for one in self._clips.values())
