"""Labels of an open vocabulary out of descriptions.

    extract_by_judge(judge, {"a": "She smiles, glad to be home."})     # a chat model is asked; replies are kept
    extract_by_words(descriptions, wheels)                             # a smoke test, no figure

The published figures are of a chat model's labels.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from emollama_jax.eval.emer import EMOTIONS, REFUSAL
from emollama_jax.eval.judge import Judge
from emollama_jax.eval.label_files import LabelSet, labels_in
from emollama_jax.eval.wheels import EmotionWheels
from emollama_jax.text.answers import plain_answer
from emollama_jax.text.words import words

NONE = {"none", "neutral none", "no emotion", "no emotions", "n/a"}
NEGATIONS = {"not", "no", "never", "without", "neither", "nor", "isn't", "doesn't"}


@dataclass(frozen=True)
class Extracted:
    """The labels of descriptions.

    Attributes:
        labels: by clip; those of clips in `failed` are empty.
        how: in words, for reports.
        failed: clips whose labels could not be had.
    """

    labels: dict[str, LabelSet]
    how: str
    failed: tuple[str, ...] = ()


def extract_by_judge(judge: Judge, descriptions: Mapping[str, str]) -> Extracted:
    """Ask a chat model which emotions each description ascribes to the person; an empty list is an answer, too.

    Raises:
        UserError: as `Judge.ask`.
    """
    texts = {name: plain_answer(text).strip() for name, text in descriptions.items()}
    asked = [name for name, text in texts.items() if text]
    replies = judge.ask([EMOTIONS.format(text=texts[name]) for name in asked])
    labels: dict[str, LabelSet] = dict.fromkeys(texts, ())
    failed = []
    for name, reply in zip(asked, replies, strict=True):
        said = plain_answer(reply.text).strip()
        if reply.status != "answered" or REFUSAL.match(said):
            failed.append(name)
        elif said.lower().strip(" .\"'[]") not in NONE:
            labels[name] = tuple(label.strip(" .") for label in labels_in(said))
    return Extracted(labels, f"by the chat model {judge.config.model}", tuple(failed))


def extract_by_words(descriptions: Mapping[str, str], wheels: EmotionWheels) -> Extracted:
    """Take the words of a text that are word forms of the wheels' tables, but for those behind a negation.

    It knows no meaning: what "happy birthday" says of a person escapes it. For smoke runs.
    """

    def find(text: str) -> LabelSet:
        said = words(plain_answer(text))
        found = (word for before, word in itertools.pairwise(["", *said]) if before not in NEGATIONS)
        return tuple(dict.fromkeys(word for word in found if word in wheels.bases))

    labels = {name: find(text) for name, text in descriptions.items()}
    return Extracted(labels, "words of the text that stand in the wheels' tables (for smoke runs, not for tables)")
