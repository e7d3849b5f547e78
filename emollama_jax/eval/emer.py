"""EMER: how far a free-form answer overlaps with the annotators' description, in its clues and in its emotions.

The published protocol (arXiv:2306.15401): a judge gives each pair of texts a score from 1 to 10, at temperature 0, and
a system's figure is the mean over the clips.

    clue overlap    the judge compares the clues (face, body, voice, words) that the two descriptions name
    label overlap   both texts are first mapped to emotion words, then the judge compares these

A reply's score is its only number, or N where it says N/10, outside of what a judge thinks aloud. Replies that are
refusals, have no number, several, or one outside 1 to 10 are counted, and not part of the mean. The wording of the
questions is our own, so figures compare with published ones only as far as two judges do.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emollama_jax.eval.benchmarks import Published
from emollama_jax.eval.judge import Judge
from emollama_jax.io.chat import ChatReply
from emollama_jax.text.answers import plain_answer

HEADINGS = {"clue": "Clue Overlap", "label": "Label Overlap"}
PUBLISHED = tuple(
    Published(who, {"clue": clue, "label": label})
    for who, clue, label in (
        ("Emotion-LLaMA", 7.83, 6.25),
        ("Valley", 7.24, 5.77),
        ("VideoChat-Embed", 7.15, 5.65),
        ("PandaGPT", 7.14, 5.51),
        ("Video-ChatGPT", 6.95, 5.74),
        ("Video-LLaMA", 6.64, 4.89),
        ("VideoChat-Text", 6.42, 3.94),
    )
)

CLUES = """\
Two observers described how the same person in a video feels. Compare only the clues they give: facial expressions, \
gestures and posture, tone of voice, and what is said. How much do the clues of the second description overlap with \
those of the first? 1 means no clue in common, 10 means the same clues. Reply with one whole number from 1 to 10 and \
nothing else.

First description:
{reference}

Second description:
{prediction}
"""
EMOTIONS = """\
Which emotions does this description ascribe to the person? Reply with emotion words only, in lower case and separated \
by commas; reply "none" if it ascribes no emotion.

Description:
{text}
"""
LABELS = """\
Two lists of emotion words say how the same person feels. How much does the second overlap in meaning with the first? \
Words with like meanings count as overlapping. 1 means nothing in common, 10 means the same emotions. Reply with one \
whole number from 1 to 10 and nothing else.

First list: {reference}
Second list: {prediction}
"""

# How refusals begin that are not marked as such.
REFUSAL = re.compile(
    r"\W*(?:i['’]?m sorry|i am sorry|sorry|i can(?:no|['’]?)t|i am unable|i['’]m unable|as an ai)\b", re.I
)

# Numbers, which are no parts of words, as in h2o; and those of which a reply says that they are out of ten.
NUMBER = re.compile(r"(?<![A-Za-z0-9_])(?:(?<![^\s*(:=])-)?[0-9]+(?:\.[0-9]+)?(?![A-Za-z0-9_%])")
OF_TEN = re.compile(
    r"(?<![A-Za-z0-9_.,/-])([0-9]+(?:\.[0-9]+)?)\s*分?\s*\(?(?:/|out of|of)\s*10(?:\.0+)?(?!\.?[0-9])", re.I
)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Overlap:
    """A judge's scores of a system's answers."""

    scores: tuple[float | None, ...]
    """1 to 10 for each clip; None where there is none."""
    statuses: tuple[str, ...]
    """For each clip: scored, refused, unparsable (no score from 1 to 10) or failed (the judge did not answer)."""

    @property
    def mean(self) -> float | None:
        """Over the clips that were scored; None where none was."""
        scored = [score for score in self.scores if score is not None]
        return sum(scored) / len(scored) if scored else None

    def count(self, status: str) -> int:
        return self.statuses.count(status)


def clue_overlap(
    judge: Judge, references: Sequence[str], predictions: Sequence[str], progress: Progress | None = None
) -> Overlap:
    """The overlap of the predictions' clues with those of the annotators' descriptions, clip by clip."""
    pairs = zip(references, predictions, strict=True)
    questions = [
        CLUES.format(reference=reference.strip(), prediction=prediction.strip()) for reference, prediction in pairs
    ]
    return _overlap([_score(answer) for answer in _ask(judge, questions, progress)])


def label_overlap(
    judge: Judge, references: Sequence[str], predictions: Sequence[str], progress: Progress | None = None
) -> Overlap:
    """The overlap of the emotions in the predictions with those in the annotators' descriptions, clip by clip."""
    texts = [*references, *predictions]
    mapped = _ask(judge, [EMOTIONS.format(text=text.strip()) for text in texts], progress)
    pairs = list(zip(mapped[: len(references)], mapped[len(references) :], strict=True))
    results: list[tuple[float | None, str] | None] = [_unmapped(*pair) for pair in pairs]
    open_clips = [i for i, result in enumerate(results) if result is None]
    questions = [
        LABELS.format(reference=reference.text.strip(), prediction=prediction.text.strip())
        for reference, prediction in (pairs[i] for i in open_clips)
    ]
    for i, answer in zip(open_clips, _ask(judge, questions, progress), strict=True):
        results[i] = _score(answer)
    return _overlap(results)


def _ask(judge: Judge, questions: Sequence[str], progress: Progress | None) -> list[ChatReply]:
    """The judge's replies without what it thinks aloud."""
    replies = judge.ask(questions, progress)
    return [ChatReply(reply.status, plain_answer(reply.text)) for reply in replies]


def _unmapped(*answers: ChatReply) -> tuple[None, str] | None:
    """The result of a clip one of whose texts has no emotion words."""
    for answer in answers:
        if answer.status != "answered" or REFUSAL.match(answer.text):
            return None, "failed" if answer.status == "failed" else "refused"
        if not re.search(r"\w", answer.text):
            return None, "unparsable"
    return None


def _score(answer: ChatReply) -> tuple[float | None, str]:
    """(score, status) of a reply."""
    if answer.status != "answered":
        return None, answer.status
    text = unicodedata.normalize("NFKC", answer.text)
    numbers = NUMBER.findall(text)
    stated = set(OF_TEN.findall(text)) or set(numbers if len(numbers) == 1 else ())
    if len(stated) == 1 and 1 <= (score := float(stated.pop())) <= 10:
        return score, "scored"
    return None, "refused" if not numbers and REFUSAL.match(text) else "unparsable"


def _overlap(results: Sequence[tuple[float | None, str]]) -> Overlap:
    scores, statuses = zip(*results, strict=True) if results else ((), ())
    return Overlap(tuple(scores), tuple(statuses))
