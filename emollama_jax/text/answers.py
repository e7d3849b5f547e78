"""Answers as the model learns to give them, and labels read back out of them."""

import re
from collections.abc import Sequence

from emollama_jax.text.labels import label_forms, split_labels
from emollama_jax.text.words import words

MAX_WORDS = 200

_REASONING = r"(?:\w+:)?(?:think|thinking|thought|reasoning)"
_THOUGHT = re.compile(rf"\A.*</{_REASONING}>", re.S | re.I)  # a template may have opened it
_UNFINISHED = re.compile(rf"<{_REASONING}>.*\Z", re.S | re.I)
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)|\\boxed\{([^{}]*)\}", re.S | re.I)
_MARK = re.compile(r"<[|｜][^<>]*[|｜]>|</?[A-Za-z_][^<>]*>|\[/?[A-Z]{3,}\]")
_REMARK = re.compile(r"\s*[(（][^()（）]*[)）]\W*\Z")
_PARTICLES = ("的", "了", "吧", "呢", "啊")  # that may end a Chinese sentence
_NEGATIONS = {"不", "没"}


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


def plain_answer(text: str) -> str:
    r"""Leave out what a model writes around its answer: its thinking, tags, and special tokens of any tokenizer.

    >>> plain_answer("<think>Is she sad?</think>\n<answer>happy</answer><|im_end|></s>")
    'happy'
    """
    text = _THOUGHT.sub("", text)
    marked = [tagged or boxed for tagged, boxed in _ANSWER.findall(text)]
    return _MARK.sub(" ", marked[-1] if marked else _UNFINISHED.sub("", text)).strip()


def parse_label(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer ends with, as written in `labels`; None where it ends with none of them.

    The reference takes an answer's last word. So does this, but thinking and markup are left out (`plain_answer`), a
    label may have several words (of two that fit, the longer counts) or be written as in `labels.ALIASES`, and neither
    letter case nor punctuation matters. A remark in parentheses may follow. Labels are whole words: "unhappy" is not
    happy. Nothing is guessed: "joyful" and "happy, I think" are no labels, nor is a list of several different ones.

    >>> parse_label("The woman is not sad: she is Happy.", ["happy", "sad"])
    'happy'
    """
    text = plain_answer(answer)
    if re.fullmatch(r"\[.*\]", text, re.S):
        found = {_last_label(item, labels) for item in split_labels(text)}
        return found.pop() if len(found) == 1 else None
    return _last_label(_REMARK.sub("", text), labels) or _last_label(text, labels)


def _last_label(text: str, labels: Sequence[str]) -> str | None:
    forms, said = label_forms(tuple(labels)), words(text)
    longest = max(map(len, forms), default=0)
    while said:
        for start in range(max(0, len(said) - longest), len(said)):
            if found := forms.get(tuple(said[start:])):
                is_denied = not said[-1].isascii() and _NEGATIONS & set(said[max(0, start - 3) : start])
                return None if is_denied else found
        if said.pop() not in _PARTICLES:
            return None
    return None
