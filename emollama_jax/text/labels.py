"""Label sets in the order in which a question lists them, and how a label is found in a table or an answer."""

import functools
import re
from collections.abc import Mapping, Sequence

from emollama_jax.text.words import words

MERR = ("happy", "sad", "neutral", "angry", "worried", "surprise", "fear", "contempt", "doubt")
MER2023 = MERR[:6]  # and the years after it
DFEW = ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear")

# How labels are also written -> how the label sets here have them.
ALIASES = {
    "happiness": "happy",
    "joy": "happy",
    "sadness": "sad",
    "neutrality": "neutral",
    "anger": "angry",
    "worry": "worried",
    "worries": "worried",
    "surprised": "surprise",
    "fearful": "fear",
    "afraid": "fear",
    "contemptuous": "contempt",
    "doubtful": "doubt",
    "disgusted": "disgust",
}

# The metrics of predicted labels, as `eval/metrics.py` computes them; validation may choose a checkpoint by any.
METRICS = (
    "accuracy",
    "weighted_precision",
    "weighted_recall",
    "weighted_f1",
    "macro_precision",
    "macro_recall",
    "macro_f1",
    "uar",
    "war",
)


def check_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the labels of a set.

    Raises:
        ValueError: there are none, one has no word or holds a comma, which parts the labels of a question, or two have
            the same words; the message begins with `labels=`.
    """
    labels = tuple(labels)
    if wordless := [label for label in labels if not words(label)]:
        raise ValueError(f"labels={labels}: {wordless[0]!r} has no word; leave it out")
    if several := [label for label in labels if re.search(r"[,，、\r\n]", label)]:
        raise ValueError(f"labels={labels}: {several[0]!r} reads as several labels; write it without a comma")
    if not labels or len({tuple(words(label)) for label in labels}) < len(labels):
        raise ValueError(f"labels={labels}: give one or more, each once")
    return labels


def find_label(text: str, labels: Sequence[str], first_number: int | None = None) -> str | None:
    """Find which of the labels a text is, as written in `labels`; None where it is none of them.

    Neither letter case nor punctuation matters, and a label may be written as in ALIASES.

    Args:
        first_number: from which number on the labels are counted; None takes no number for a label's.

    >>> find_label("Surprised", ["happy", "surprise"]), find_label("1", ["happy", "surprise"], first_number=1)
    ('surprise', 'happy')
    """
    if found := label_forms(tuple(labels)).get(tuple(words(text))):
        return found
    number = re.fullmatch(r"(\d+)(\.0*)?", text.strip(), re.ASCII)  # spreadsheets and pandas write 1.0
    if number and first_number is not None and 0 <= (place := int(number[1]) - first_number) < len(labels):
        return labels[place]
    return None


def split_labels(text: str) -> list[str]:
    """Split what may be a list of labels, as in "['happy', 'sad']" or "happy, sad", into them.

    >>> split_labels("['happy', 'very sad']"), split_labels("happy")
    (['happy', 'very sad'], ['happy'])
    """
    items = [item.strip(" \t\r\n[]\"'") for item in re.split("[,，、;；]", text)]
    return [item for item in items if words(item)]


@functools.lru_cache(maxsize=64)
def label_forms(labels: tuple[str, ...]) -> Mapping[tuple[str, ...], str]:
    """Map the words of each form of the labels to the label. What two labels could mean is left out."""
    own = {tuple(words(label)): label for label in reversed(labels)}
    bases = ALIASES | {base: base for base in ALIASES.values()}
    others: dict[tuple[str, ...], set[str]] = {}
    for form, label in own.items():
        base = bases.get(" ".join(form))
        for other in (other for other in bases if base and bases[other] == base):
            others.setdefault((other,), set()).add(label)
    return {form: min(meant) for form, meant in others.items() if len(meant) == 1} | own
