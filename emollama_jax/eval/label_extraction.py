"""Labels of an open vocabulary out of descriptions.

    extract_by_judge(judge, {"a": "She smiles, glad to be home."})     # a chat model is asked; replies are kept
    extract_by_likelihood(model.llama, tokenizer, descriptions, wheels.vocabulary)
    extract_by_words(descriptions, wheels)                             # a smoke test, no figure

The published figures are of a chat model's labels. A likelihood needs no key and gives the same labels every time.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from emollama_jax.eval.emer import EMOTIONS, REFUSAL
from emollama_jax.eval.judge import Judge
from emollama_jax.eval.label_files import LabelSet, labels_in
from emollama_jax.eval.wheels import EmotionWheels
from emollama_jax.infer.likelihood import answer_likelihoods
from emollama_jax.models.llama import Llama
from emollama_jax.text.answers import plain_answer
from emollama_jax.text.prompts import encode_text
from emollama_jax.text.tokenizers import Tokenizer
from emollama_jax.text.words import words

NONE = {"none", "neutral none", "no emotion", "no emotions", "n/a"}
NEGATIONS = {"not", "no", "never", "without", "neither", "nor", "isn't", "doesn't"}
BATCH = 8  # descriptions that are scored together


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


def extract_by_likelihood(
    model: Llama,
    tokenizer: Tokenizer,
    descriptions: Mapping[str, str],
    vocabulary: Sequence[str],
    *,
    question: str = "Which emotion does this description ascribe to the person?",
    share: float = 0.5,
    most: int = 8,
    how: str = "likelihood of the wheels' words",
    progress: Callable[[int], None] = lambda count: None,
) -> Extracted:
    """Take the words that a language model finds likely as the answer to a question about each description.

    What a word gains by the description counts, its likelihood over that without any description, so that frequent
    words are no likelier than rare ones.

    Args:
        vocabulary: the words to choose from, as a rule those of the wheels.
        share: words are taken whose gain is at least this share of the best one's, as probabilities.
        most: of these the best, at most so many.
        progress: is told how many more descriptions are done.
    """
    answers = [(*tokenizer.encode(word, specials=False), tokenizer.eos_id) for word in vocabulary]
    plain = {name: plain_answer(text).strip() for name, text in descriptions.items()}
    prompt = lambda text: [encode_text(tokenizer, f"{text} {question}".strip())]
    width = model.config.hidden_size

    def score(texts: Sequence[str]) -> np.ndarray:
        soft = jnp.zeros((len(texts), 1, width), jnp.float32)
        return answer_likelihoods(model, [prompt(text) for text in texts], soft, answers).log[:, 0]

    without, labels = score([""])[0], dict.fromkeys(plain, ())
    described = [name for name, text in plain.items() if text]
    for start in range(0, len(described), BATCH):
        names = described[start : start + BATCH]
        for name, gains in zip(names, score([plain[name] for name in names]) - without, strict=True):
            order = np.argsort(-gains, kind="stable")[:most]
            labels[name] = tuple(vocabulary[i] for i in order if gains[i] >= gains.max() + np.log(share))
        progress(len(names))
    return Extracted(labels, how)
