"""What people are shown of what a model saw."""

import numpy as np
from jaxtyping import Float

from emollama_jax.media.clip import ClipMedia
from emollama_jax.serve.cache import Seen

PARTS = 400  # of a waveform


def seen_of(media: ClipMedia) -> Seen:
    """Return the face in the frame that was taken, or nearest to it, and the outline of the waveform."""
    face = None
    if media.faces is not None and len(media.faces):
        face = media.faces[media.face_index]
    return Seen(face, None if media.waveform is None else envelope(media.waveform))


def envelope(waveform: Float[np.ndarray, " S"]) -> Float[np.ndarray, "W 2"]:
    """Return the least and the greatest value in each of PARTS equal parts, or fewer of a short waveform."""
    parts = np.array_split(waveform, min(PARTS, len(waveform)))
    return np.array([(part.min(), part.max()) for part in parts], np.float32)
