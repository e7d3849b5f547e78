"""Writes the files that the tools for action units would make of synthetic clips, out of the clips' true units.

Axes: F frames, U units.
"""

import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from emollama_jax.io.atomic import write_text
from emollama_jax.media.action_units import OPENFACE3_UNITS
from emollama_jax.synthetic.clip import FPS, ClipSpec, clip_aus

STRONGEST = 5.0  # the tools' scale ends there
OPENFACE_UNITS = tuple(f"AU{n:02d}" for n in (1, 2, 4, 5, 6, 7, 9, 10, 12, 14, 15, 17, 20, 23, 25, 26, 45))
LIBREFACE_UNITS = tuple(f"AU{n:02d}" for n in (1, 2, 4, 5, 6, 9, 12, 15, 17, 20, 25, 26))
SOURCES = ("openface2", "openface3", "libreface")


def write_action_units(
    clips: Iterable[ClipSpec], folder: str | Path, source: str = "openface2", *, noise: float = 0.1
) -> None:
    """Writes {name}.csv of each clip, in the form of a tool, with a tool's faults.

    The values have noise of this standard deviation (of STRONGEST); in each clip the eyes blink once, for two frames,
    and one frame failed, whose values are the largest there are.

    Args:
        source: openface2, openface3 or libreface.
    """
    for spec in clips:
        write_text(Path(folder) / f"{spec.name}.csv", _csv(spec, source, noise))


def _csv(spec: ClipSpec, source: str, noise: float) -> str:
    rng = np.random.default_rng((spec.seed, zlib.crc32(source.encode())))
    units = {"openface2": OPENFACE_UNITS, "openface3": OPENFACE3_UNITS, "libreface": LIBREFACE_UNITS}[source]
    truth = clip_aus(spec)
    values = STRONGEST * np.array([[frame.get(unit, 0.0) for unit in units] for frame in truth])
    values = (values + rng.normal(0, noise, values.shape)).clip(0, STRONGEST)
    blink, failed = _faults(spec)
    if source == "openface2":
        values[blink : blink + 2, units.index("AU45")] = 4.0
        values[blink : blink + 2, units.index("AU07")] = 2.5
        values[failed] = STRONGEST
        head = ["frame", "face_id", "timestamp", "confidence", "success"]
        lines = [", ".join([*head, *(f"{u}_r" for u in units), *(f"{u}_c" for u in (*units, "AU28"))])]
        for i, row in enumerate(values):
            start = [i + 1, 0, f"{float(i / FPS):.3f}", 0.2 if i == failed else 0.98, int(i != failed)]
            lines.append(", ".join(map(str, [*start, *(f"{v:.2f}" for v in row), *(int(v >= 1) for v in row), 0])))
    elif source == "openface3":
        lines = ["frame,face_id,emotion,au"]
        for i, row in enumerate(values):
            cell = "" if i == failed else "[" + ", ".join(f"{v:.4f}" for v in row) + "]"
            lines.append(f'{i},0,Neutral,"{cell}"')
    else:
        lines = [",".join(["frame_idx", *(f"au_{int(u[2:])}_intensity" for u in units)])]
        for i, row in enumerate(values):
            lines.append(",".join([str(i), *("" if i == failed else f"{v:.3f}" for v in row)]))
    return "\n".join(lines) + "\n"


def _faults(spec: ClipSpec) -> tuple[int, int]:
    """The first frame of a blink, and a frame that failed: both away from the peak."""
    return max(1, spec.peak_index // 3), spec.peak_index + (spec.num_frames - spec.peak_index) // 2
