"""Frames out of video files (PyAV)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from emollama_jax.errors import UserError


def read_frame(path: str | Path, index: int | Callable[[int], int] = 0) -> UInt8[np.ndarray, "H W 3"]:
    """One RGB frame of a video, as it is stored.

    Args:
        index: from 0, or a function that gives it from the number of frames; one beyond the end gives the last frame.

    Raises:
        UserError: PyAV is not installed, there is no such file, or no frame can be decoded.
    """
    av = import_av()
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if callable(index):
                index = index(stream.frames or sum(1 for _ in container.decode(stream)))
                container.seek(0)
            found = None
            for number, frame in enumerate(container.decode(stream)):
                found = frame
                if number >= index:
                    break
            if found is None:
                raise ValueError("no frames")
            return found.to_ndarray(format="rgb24")
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}; check the path") from error
    except (av.FFmpegError, IndexError, ValueError, OSError) as error:
        raise UserError(f"not a video, or damaged or cut short: {path}; copy it again or leave it out") from error


def import_av():
    """The package av. Raises UserError where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError("videos need PyAV; pip install 'emollama_jax[media]'") from error
    return av
