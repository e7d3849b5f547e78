"""Label scoring: how likely each label is as the answer to the emotion question, all labels in one pass.

What a clip is asked under its label orders begins alike: soft tokens, subtitle, the question up to its first label.
This is run once (`infer/likelihood.py`).

Axes: N clips, S soft tokens, D width, O label orders, L labels, P prefix slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Float
from scipy.special import softmax

from emollama_jax.errors import UserError
from emollama_jax.infer.likelihood import Likelihoods, answer_likelihoods, compile_likelihoods
from emollama_jax.models.llama import Llama
from emollama_jax.models.projectors import NUM_FEATURE_TOKENS
from emollama_jax.text.answers import normalize_answer
from emollama_jax.text.prompts import PromptConfig, Sample, Turn, emotion_question, encode_turns, request
from emollama_jax.text.tokenizers import Tokenizer


@dataclass(frozen=True, slots=True)
class LabelScores:
    """How likely each label is for each clip, under each order of the labels in the question."""

    labels: tuple[str, ...]
    """The L labels, as they were given."""
    orders: tuple[tuple[str, ...], ...]
    """The O orders in which the question listed them."""
    log_likelihoods: Float[np.ndarray, "N O L"]
    """Of the whole answer: the label's tokens and the end of the sequence."""
    by_order: Float[np.ndarray, "N O L"]
    """Probabilities among the labels, under each order."""
    tokens: Float[np.ndarray, " N"]
    """Tokens that the model read for each clip, without padding."""

    @property
    def probabilities(self) -> Float[np.ndarray, "N L"]:
        """The mean of the orders' probabilities."""
        return self.by_order.mean(axis=1)

    @property
    def best(self) -> list[str]:
        """The most likely label of each clip."""
        return [self.labels[i] for i in self.probabilities.argmax(axis=-1)]

    @property
    def best_by_order(self) -> list[list[str]]:
        """The most likely label of each clip under each order, [O][N]."""
        return [[self.labels[i] for i in order] for order in self.by_order.argmax(axis=-1).T]


def label_orders(labels: tuple[str, ...], count: int) -> tuple[tuple[str, ...], ...]:
    """So many orders of the labels: as they are given for 1, else cyclic ones of the sorted labels, spread evenly."""
    first = labels if count == 1 else tuple(sorted(labels))
    starts = [order * len(labels) // count for order in range(count)]
    return tuple(first[start:] + first[:start] for start in starts)


class LabelScorer:
    """Scores labels with one model.

    A clip's scores depend on the clip alone, up to rounding: not on those beside it, nor on padding.

    Args:
        model: the decoder; its parameters stay where they are placed.
        prompt: the layout, the labels, and what stands for missing features; the task is always `emotion`.
        orders: 1 asks once, with the labels in the order of `prompt.labels`, as the model was trained. More asks under
            that many cyclic orders and averages the probabilities. Then the labels are sorted first and the orders
            spread evenly over all L, so the order in which the labels are given makes no difference.

    Raises:
        UserError: there are fewer than two labels, or fewer labels than orders.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        prompt: PromptConfig,
        *,
        orders: int = 1,
    ):
        labels = prompt.labels
        if len(labels) < 2:
            raise UserError(f"prompt.labels={labels}: give two labels or more to choose from")
        if not 1 <= orders <= len(labels):
            raise UserError(f"{orders} label orders of {len(labels)} labels; give 1 to {len(labels)}")
        self._model = model
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._orders = label_orders(labels, orders)
        self._labels = self._orders[0]
        encode = lambda label: tokenizer.encode(normalize_answer(label), specials=False)  # as in training
        self._answers = [(*encode(label), tokenizer.eos_id) for label in self._labels]

    def score(
        self,
        subtitles: Sequence[str],
        soft: Float[Array, "N S D"],
        has_feature: Sequence[Sequence[bool]] | None = None,
        history: Sequence[Sequence[Turn]] | None = None,
        *,
        length: int | None = None,
    ) -> LabelScores:
        """The scores of N clips.

        Args:
            subtitles: what is said in each, "" for nothing.
            soft: their soft tokens (`EmotionLlama.soft_tokens`).
            has_feature: of MAE, VideoMAE and HuBERT for each clip, with `prompt.missing="omit"`; default: all.
            history: earlier turns of each clip's conversation, with their answers.
            length: P; default: as the longest prefix needs.
        """
        clips = len(subtitles)
        has_feature = [(True, True, True)] * clips if has_feature is None else has_feature
        history = [()] * clips if history is None else history
        if not clips == len(soft) == len(has_feature):
            given = f"{clips} subtitles, the soft tokens of {len(soft)} clips and {len(has_feature)} has_feature"
            raise ValueError(f"{given} do not match")
        image_tokens = soft.shape[1] - NUM_FEATURE_TOKENS
        clips_asked = zip(subtitles, has_feature, history, strict=True)
        asked = [self.prompts(said, has, image_tokens, before) for said, has, before in clips_asked]
        return self.to_scores(self.likelihoods(asked, soft, length=length))

    def compile(self, soft: Float[Array, "N S D"], *, length: int) -> None:
        """Compile the program that `score` runs for so many clips, without running it."""
        asked = [self.prompts("", (True, True, True), soft.shape[1] - NUM_FEATURE_TOKENS)] * len(soft)
        compile_likelihoods(self._model, asked, soft, self._answers, length=length)

    def prompts(
        self, subtitle: str, has_feature: Sequence[bool], image_tokens: int, history: Sequence[Turn] = ()
    ) -> list[Sample]:
        """Return a clip's prompt under every order."""
        turns = [
            Turn(request("emotion", emotion_question(order, self._prompt.emotion_question))) for order in self._orders
        ]
        settings = {"subtitle": subtitle, "has_feature": has_feature, "image_tokens": image_tokens}
        return [encode_turns(self._tokenizer, [*history, turn], self._prompt, **settings) for turn in turns]

    def likelihoods(
        self,
        asked: Sequence[Sequence[Sample]],
        soft: Float[Array, "N S D"],
        *,
        shared_soft: int | None = None,
        length: int | None = None,
    ) -> Likelihoods:
        """Score the labels behind prompts; see `answer_likelihoods`."""
        return answer_likelihoods(self._model, asked, soft, self._answers, shared_soft=shared_soft, length=length)

    def to_scores(self, found: Likelihoods) -> LabelScores:
        """Return the scores of clips whose prompts were those of `prompts`."""
        log = found.log.reshape(len(found.log), len(self._orders), len(self._labels))
        by_order = softmax(log, axis=-1)
        given = [self._labels.index(label) for label in self._prompt.labels]
        return LabelScores(self._prompt.labels, self._orders, log[..., given], by_order[..., given], found.tokens)
