"""Answers as the model learns to give them, and labels read back out of them."""

import re
from collections.abc import Sequence

MAX_WORDS = 200


def normalize_answer(text: str, max_words: int = MAX_WORDS) -> str:
    r"""A label or a caption in the form of the training answers.

    Lower case; each of .!"()*#:;~ becomes a space; two white spaces or more become one space; newlines at the end and
    spaces at both ends go; at most `max_words` words stay.

    >>> normalize_answer('She says: "No!"  Her brows\trise.\n')
    'she says no her brows\trise'
    """
    text = re.sub(r'[.!"()*#:;~]', " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def parse_label(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer ends with, as written in `labels`; None where it ends with none of them.

    The reference takes an answer's last word. So does this, but a label may have several words (of two that fit, the
    longer counts), and neither letter case nor punctuation matters. Labels are whole words: "unhappy" is not happy.
    Nothing is guessed: "joyful", "happiness" and "happy, I think" are no labels.

    >>> parse_label("The woman is not sad: she is Happy.", ["happy", "sad"])
    'happy'
    """
    said = words(answer)
    for label in sorted(labels, key=lambda label: -len(words(label))):
        wanted = words(label)
        if wanted and said[-len(wanted) :] == wanted:
            return label
    return None


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation except within a word: it's, half-hearted."""
    return re.findall(r"\w+(?:['’-]\w+)*", text.lower())
