"""Free-form answers without a judge, by their words: for smoke runs and trends, not for tables.

These figures know no synonyms: "delighted" does not hit "happy". Chinese and Japanese characters count as words.
"""

from collections.abc import Sequence

from emollama_jax.text.words import words

# Words that say nothing of a clue; the list is short on purpose.
FUNCTION_WORDS = frozenset(
    "a an the and or but if so as of in on at to for from with by about into over under it its is are was were be been "
    "being am do does did has have had this that these those there here he she they them his her their him who which "
    "what when where while how i you we my your our not no may might can could will would should than then also very "
    "person video man woman".split()
)


def label_hit_rate(labels: Sequence[str], predictions: Sequence[str]) -> float:
    """The share of clips whose label stands in the prediction, as whole words and in any case.

    Raises:
        ValueError: there are no clips.
    """
    if not labels:
        raise ValueError("no clips to score")
    return sum(_holds(text, label) for label, text in zip(labels, predictions, strict=True)) / len(labels)


def clue_word_overlap(references: Sequence[str], predictions: Sequence[str]) -> float:
    """The mean F1 of the predictions' different content words and those of the references.

    Raises:
        ValueError: there are no clips.
    """
    if not references:
        raise ValueError("no clips to score")
    pairs = zip(references, predictions, strict=True)
    return sum(_f1(_content(reference), _content(text)) for reference, text in pairs) / len(references)


def _holds(text: str, label: str) -> bool:
    said, wanted = words(text), words(label)
    return any(said[i : i + len(wanted)] == wanted for i in range(len(said) - len(wanted) + 1))


def _content(text: str) -> set[str]:
    return set(words(text)) - FUNCTION_WORDS


def _f1(one: set[str], other: set[str]) -> float:
    return 2 * len(one & other) / (len(one) + len(other)) if one or other else 0.0
