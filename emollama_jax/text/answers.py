"""Answers as the model learns to give them."""

import re

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
