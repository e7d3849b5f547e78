"""What a notebook shows of a clip and of an answer, as HTML."""

import base64
import mimetypes
import subprocess
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from IPython.display import HTML, Image

from emollama_jax.errors import UserError
from emollama_jax.notebook.shell import find_python

MAX_INLINE = 48 << 20  # bytes; notebooks beyond are slow to open
SHEET = "import sys; from emollama_jax.notebook.sheet import main; main(*sys.argv[1:])"
GRID = "display:grid;grid-template-columns:max-content minmax(8em,24em) max-content;gap:.3em .7em;align-items:center"


def play(video: str | Path, *, width: int = 420) -> HTML:
    """Return a player of a video, with its bytes inside the page.

    Args:
        width: of the player, in pixels.

    Raises:
        UserError: no such file, or it is over 48 MiB.
    """
    path = Path(video)
    if not path.is_file():
        raise UserError(f"no such file: {path}; check the path")
    if (size := path.stat().st_size) > MAX_INLINE:
        raise UserError(f"{path}: {size >> 20} MiB, over {MAX_INLINE >> 20} for a page; cut it, or see contact_sheet")
    data = f"data:{mime_type(path)};base64,{base64.b64encode(path.read_bytes()).decode()}"
    fallback = f"{escape(path.name)} cannot be played here; contact_sheet shows its frames"
    return HTML(f'<video controls playsinline width="{width}" src="{data}">{fallback}</video>')


def bars(answer: Any) -> HTML:
    """Return the labels' probabilities as bars, the best on top.

    Args:
        answer: with `probabilities`, as `Engine.label` gives it, or a mapping from label to probability.

    Raises:
        UserError: there are none, as in the answer to a question.
    """
    found = getattr(answer, "probabilities", answer)
    if not isinstance(found, Mapping) or not found:
        raise UserError("no probabilities to draw; ask with label()")
    rows = []
    for label, value in sorted(found.items(), key=lambda pair: -pair[1]):
        bar = f'<div style="width:{value:.2%};height:1.1em;border-radius:.3em;background:#4c78a8"></div>'
        track = f'<div style="background:#8883;border-radius:.3em">{bar}</div>'
        rows.append(f"<span>{escape(label)}</span>{track}<span>{value:.0%}</span>")
    spoken = ", ".join(f"{label} {value:.0%}" for label, value in found.items())
    return HTML(f'<div role="img" aria-label="{escape(spoken)}" style="{GRID}">{"".join(rows)}</div>')


def contact_sheet(video: str | Path, *, frames: int = 12, columns: int = 4) -> Image:
    """Return frames drawn evenly from a video, with their times, side by side.

    Videos are decoded by the environment of `emollama`, so that the kernel needs no decoder.

    Raises:
        UserError: no such file, or no frame of it can be decoded.
    """
    command = [find_python(), "-c", SHEET, str(video), str(frames), str(columns)]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise UserError((done.stderr.decode(errors="replace").strip() or "the frames cannot be read").splitlines()[-1])
    return Image(done.stdout, format="png", alt=f"{frames} frames of {Path(video).name}")


def find_videos(folder: str | Path) -> list[Path]:
    """Return the videos below a folder, sorted. Raises UserError where there are none."""
    found = sorted(
        path for path in Path(folder).rglob("*") if path.is_file() and mime_type(path, "").startswith("video/")
    )
    if not found:
        raise UserError(f"no videos below {folder}; check the path")
    return found


def mime_type(path: Path, otherwise: str = "video/mp4") -> str:
    """Return the type of a video, as browsers and servers call it, by its suffix."""
    return mimetypes.guess_type(path.name)[0] or otherwise
