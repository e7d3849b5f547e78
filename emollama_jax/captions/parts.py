"""The parts of an annotation, and the coarse caption that joins them."""

from dataclasses import dataclass

VERSION = 1  # counted up when the same parts would give another caption
DOUBT = {"blendshapes": " (by blendshapes, which a grimace of pain moves as a smile does)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What is known of a clip in words; "" and () where nothing is."""

    label: str
    picture: str = ""
    """A sentence or more about the peak frame."""
    expression: tuple[str, ...] = ()
    """A phrase for each active unit."""
    expression_by: str = ""
    """The tool that measured the units."""
    voice: str = ""
    """As in "a high voice", or a sentence."""
    subtitle: str = ""


def coarse_caption(parts: Parts) -> str:
    """Joins the parts but the label to a caption, as stage 1 learns it."""
    sentences = [parts.picture.strip()]
    if parts.expression:
        sentences.append(f"The expression and actions include: {'; '.join(parts.expression)}.")
    if parts.voice:
        is_sentence = parts.voice.endswith((".", "!", "?"))
        sentences.append(parts.voice if is_sentence else f"The person speaks in {parts.voice}.")
    if parts.subtitle:
        sentences.append(f'The person is saying: "{parts.subtitle.strip()}"')
    return " ".join(filter(None, sentences))


def clues(parts: Parts) -> str:
    """Lists the parts, one a line, for a model that infers from them."""
    lines = {
        "Picture of the moment of strongest expression": parts.picture,
        f"Facial expression{DOUBT.get(parts.expression_by, '')}": "; ".join(parts.expression),
        "Tone of voice": parts.voice,
        "Words": parts.subtitle,
        "Emotion": parts.label,
    }
    return "\n".join(f"{name}: {text}" for name, text in lines.items() if text)
