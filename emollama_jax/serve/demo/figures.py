"""What the page shows beside text, as HTML: no picture of a clip becomes a file."""

import base64
import io
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from emollama_jax.serve.cache import EncodedClip

STYLE = """
#clip video { max-height: 19rem; }
#labels input { padding-right: 2rem; text-overflow: ellipsis; }
#bars .emo-bars, #seen .emo-seen, #bars .emo-empty, #seen .emo-empty { margin-top: 1.2rem; }
.emo-bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .35rem .6rem; align-items: center; }
.emo-track { position: relative; height: 1.1rem; border-radius: .3rem; background: var(--background-fill-secondary); }
.emo-bar { position: absolute; inset: 0 auto 0 0; border-radius: .3rem; background: var(--primary-500); }
.emo-spread { position: absolute; top: 50%; height: 2px; background: var(--body-text-color); }
.emo-best { font-weight: 600; }
.emo-seen { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.emo-seen figure { margin: 0; flex: 1 1 7rem; max-width: 16rem; }
.emo-seen figure.emo-wide { flex: 1 1 100%; max-width: none; }
.emo-seen img, .emo-seen svg { width: 100%; border-radius: .4rem; display: block; }
.emo-seen figcaption, .emo-note { font-size: .85rem; opacity: .8; margin-top: .3rem; }
.emo-empty { opacity: .7; padding: .6rem 0; }
"""


def bars(probabilities: Mapping[str, float], spread: Mapping[str, tuple[float, float]], orders: int) -> str:
    """The labels' probabilities, the best on top, with the least and the greatest over the labels' orders."""
    rows = []
    for i, (label, value) in enumerate(probabilities.items()):
        low, high = spread.get(label, (value, value))
        line = f'<div class="emo-spread" style="left:{low:.2%};width:{high - low:.2%}"></div>' if orders > 1 else ""
        track = f'<div class="emo-track"><div class="emo-bar" style="width:{value:.2%}"></div>{line}</div>'
        name = f'<span class="{"emo-best" if i == 0 else ""}">{escape(label)}</span>'
        rows.append(f"{name}{track}<span>{value:.0%}</span>")
    spoken = ", ".join(f"{label} {value:.0%}" for label, value in probabilities.items())
    note = ""
    if orders > 1:
        note = (
            f'<div class="emo-note">The mean over {orders} orders of the labels; lines: from least to greatest.</div>'
        )
    return f'<div class="emo-bars" role="img" aria-label="{escape(spoken)}">{"".join(rows)}</div>{note}'


def seen(encoded: EncodedClip, subtitle: str) -> str:
    """What the model saw: the frame with the face that is meant, the face, the sound, and the words."""
    info, parts = encoded.clip_info, []
    if encoded.clip.frame is not None and info["frames"]:
        which = f"frame {info.get('frame', 0) + 1} of {info['frames']}"
        box = info.get("face_box")
        caption = f"{which}; the box is the face that is meant" if box else which
        parts.append(_figure(picture(encoded.clip.frame, box), caption))
    if encoded.seen.face is not None:
        looked, found = info.get("faces_looked_for", 0), info.get("faces_found", 0)
        crops = info.get("crops")
        caption = f"the face, found in {found} of {looked} frames" if crops == "face" else "no face: the frame's middle"
        parts.append(_figure(picture(encoded.seen.face), caption))
    if encoded.seen.envelope is not None:
        caption = f"{info.get('sound_seconds', 0):.1f} s of sound"
        parts.append(_figure(waveform(encoded.seen.envelope), caption, is_wide=True))
    else:
        parts.append('<div class="emo-note">no sound</div>')
    source = {"given": "typed", "file": "of a file", "track": "of the video's track", "speech": "heard"}
    where = source.get(str(info.get("subtitle_source", "")), "")
    words = f"“{escape(subtitle)}”{f' ({where})' if where else ''}" if subtitle else "none"
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in info.get("notes", ()))
    return (
        f'<div class="emo-seen">{"".join(parts)}</div><div class="emo-note">Words: {words}</div>'
        f"{f'<ul class=emo-note>{notes}</ul>' if notes else ''}"
    )


def empty(text: str) -> str:
    return f'<div class="emo-empty">{escape(text)}</div>'


def picture(pixels: UInt8[np.ndarray, "H W 3"], box: Any = None) -> str:
    """An image, with a box in parts of its size, as an HTML element."""
    image = Image.fromarray(pixels)
    if box is not None:
        x, y, width, height = (part * side for part, side in zip(box, image.size * 2, strict=True))
        corners, line = (x, y, x + width, y + height), max(1, image.width // 110)
        ImageDraw.Draw(image).rectangle(corners, outline=(255, 196, 0), width=line)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def waveform(envelope: Float[np.ndarray, "W 2"]) -> str:
    """The outline of a sound, scaled to its loudest part, as an SVG."""
    scale = 38 / max(float(np.abs(envelope).max()), 1e-6)
    step = 400 / len(envelope)
    top = [f"{i * step:.1f},{40 - high * scale:.1f}" for i, (_, high) in enumerate(envelope)]
    bottom = [f"{i * step:.1f},{40 - low * scale:.1f}" for i, (low, _) in reversed(list(enumerate(envelope)))]
    points = " ".join([*top, *bottom])
    shape = f'<polygon points="{points}" fill="currentColor" stroke="currentColor" stroke-width="0.6"/>'
    return f'<svg viewBox="0 0 400 80" preserveAspectRatio="none" style="height:4rem">{shape}</svg>'


def _figure(content: str, caption: str, *, is_wide: bool = False) -> str:
    return (
        f'<figure class="{"emo-wide" if is_wide else ""}">{content}<figcaption>{escape(caption)}</figcaption></figure>'
    )
