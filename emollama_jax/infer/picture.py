"""What the model saw of a clip and what it answered, as a picture."""

import io
import textwrap
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8

from emollama_jax.io.atomic import write_bytes
from emollama_jax.io.paths import PathLike
from emollama_jax.text.fonts import DEFAULT_FONT, find_fonts

WIDTH = 92  # characters of a line below the frame and the bars


def plot_answer(
    file: PathLike,
    frame: UInt8[np.ndarray, "H W 3"],
    probabilities: Mapping[str, float],
    *,
    subtitle: str,
    answer: str,
) -> None:
    """Draw a clip's frame (RGB), the probabilities of its labels as bars, the best on top, and below them what is said
    in the clip and the model's answer, as a PNG. Needs matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    said, answered = _printable(subtitle) or "(nothing)", _printable(answer)
    texts = [textwrap.fill(f"Said: {said}", WIDTH), textwrap.fill(f"Answer: {answered}", WIDTH)]
    labels = sorted(probabilities, key=probabilities.get)
    picture = io.BytesIO()
    with matplotlib.rc_context({"font.family": find_fonts("".join((*texts, *labels))) or [DEFAULT_FONT]}):
        figure = Figure(figsize=(8, 4.2), dpi=100, layout="constrained")
        shown, bars = figure.subplots(1, 2, width_ratios=(1, 1.2))
        shown.imshow(frame)
        shown.set_axis_off()
        drawn = bars.barh(labels, [probabilities[label] for label in labels])
        bars.bar_label(drawn, fmt="{:.0%}", padding=3)
        bars.set_xlim(0, 1.12)
        bars.set_xticks([])
        bars.spines[["top", "right", "bottom"]].set_visible(False)
        bars.set_title("probability of each label")
        figure.supxlabel("\n".join(texts).replace("$", r"\$"), x=0.02, ha="left", fontsize="medium")
        figure.savefig(picture, format="png")
    write_bytes(file, picture.getvalue())


def _printable(text: str) -> str:
    """The text on one line, with what has no glyph, such as control characters, as Python writes it: \\x1b."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
