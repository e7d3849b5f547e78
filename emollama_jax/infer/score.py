"""Label scoring: how likely each label is as the answer to the emotion question, all labels in one pass.

Axes: N clips, B rows (clips padded to a power of two), P prefix slots, T tree slots, S soft tokens, D width, O label
orders, L labels, E tokens of a label's answer with its end, G likelihoods of a row: O L E, padded to a bucket.

What a clip is asked under its label orders begins alike: soft tokens, subtitle, the question up to its first label.
This prefix is run once. All that follows is a tree, packed into one row and run against the prefix's keys and values:

    prefix ── order 1: "happy, sad. [/INST]" ── "happy"
           │                                 └─ "sad"
           └─ order 2: "sad, happy. [/INST]" ── "sad"
                                             └─ "happy"

A token sees the prefix and what lies between it and the root. The ends of answers are predicted, never read.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, Float
from scipy.special import softmax

from emollama_jax.data.packing import pack_rows
from emollama_jax.errors import UserError
from emollama_jax.infer.shapes import bucket, power_of_two
from emollama_jax.models.emotion_llama import insert_soft_tokens
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
            length: P, at least that of the longest prefix; default: its bucket.
        """
        clips = len(subtitles)
        has_feature = [(True, True, True)] * clips if has_feature is None else has_feature
        history = [()] * clips if history is None else history
        if not clips == len(soft) == len(has_feature):
            given = f"{clips} subtitles, the soft tokens of {len(soft)} clips and {len(has_feature)} has_feature"
            raise ValueError(f"{given} do not match")
        shape = (clips, len(self._orders), len(self._labels))
        log_likelihoods = np.zeros(shape, np.float64)
        if clips:
            inputs = self._inputs(subtitles, soft, has_feature, history, length)
            nll = _on_host(_nll(*nnx.split(self._model), *inputs)).astype(np.float64)[:clips]
            asked_for = len(self._orders) * len(self._answers) * max(map(len, self._answers))
            log_likelihoods = -nll[:, :asked_for].reshape(*shape, -1).sum(axis=-1)
        by_order = softmax(log_likelihoods, axis=-1)
        given = [self._labels.index(label) for label in self._prompt.labels]
        return LabelScores(self._prompt.labels, self._orders, log_likelihoods[..., given], by_order[..., given])

    def compile(self, soft: Float[Array, "N S D"], *, length: int) -> None:
        """Compile the program that `score` runs for so many clips, without running it."""
        clips = len(soft)
        inputs = self._inputs([""] * clips, soft, [(True, True, True)] * clips, [()] * clips, length)
        _nll.lower(*nnx.split(self._model), *inputs).compile()

    def _inputs(
        self,
        subtitles: Sequence[str],
        soft: Float[Array, "N S D"],
        has_feature: Sequence[Sequence[bool]],
        history: Sequence[Sequence[Turn]],
        length: int | None,
    ) -> tuple[dict[str, np.ndarray], Float[Array, "B S D"]]:
        """What `_nll` takes after the model."""
        image_tokens = soft.shape[1] - NUM_FEATURE_TOKENS
        clips_asked = zip(subtitles, has_feature, history, strict=True)
        asked = [self._ask(said, has, image_tokens, before) for said, has, before in clips_asked]
        batch = _batch(asked, self._answers, soft.shape[1], length)
        if idle := len(batch["tokens"]) - len(soft):
            soft = jnp.pad(soft, ((0, idle), (0, 0), (0, 0)))
        return batch, soft

    def _ask(
        self, subtitle: str, has_feature: Sequence[bool], image_tokens: int, history: Sequence[Turn] = ()
    ) -> list[Sample]:
        """A clip's prompt under every order."""
        turns = [
            Turn(request("emotion", emotion_question(order, self._prompt.emotion_question))) for order in self._orders
        ]
        settings = {"subtitle": subtitle, "has_feature": has_feature, "image_tokens": image_tokens}
        return [encode_turns(self._tokenizer, [*history, turn], self._prompt, **settings) for turn in turns]


def _on_host(x: jax.Array) -> np.ndarray:
    """The whole of an array that may be spread over several processes, in each of them."""
    return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)


@functools.partial(jax.jit, static_argnames="graphdef")
def _nll(graphdef, state, batch, soft):
    """Negative log-likelihoods [B, G] of the answers' tokens, 0 where an answer has none."""
    model: Llama = nnx.merge(graphdef, state)
    prefix_slots, tree_slots = batch["tokens"].shape[1], batch["tree_tokens"].shape[1]
    prefix_lengths = (batch["segment_ids"] > 0).sum(axis=1)
    x = insert_soft_tokens(model.embed_tokens(batch["tokens"]), soft, batch["soft_index"])
    _, cache = model.prefill(x, prefix_lengths, prefix_slots + tree_slots)
    order, label = batch["tree_order"], batch["tree_label"]
    in_tree = (order[:, :, None] == order[:, None, :]) & (jnp.arange(tree_slots) <= jnp.arange(tree_slots)[:, None])
    in_tree &= (label[:, None, :] == 0) | (label[:, :, None] == label[:, None, :])
    x = model.embed_tokens(batch["tree_tokens"])
    hidden, _ = model.extend(x, cache, batch["tree_positions"], in_tree)
    before = jnp.take_along_axis(hidden, batch["before"][..., None], axis=1)
    return jnp.where(batch["target"] >= 0, model.token_nll(before, jnp.maximum(batch["target"], 0)), 0)


def _batch(
    asked: Sequence[Sequence[Sample]], answers: Sequence[Sequence[int]], soft_per_clip: int, prefix: int | None
) -> dict[str, np.ndarray]:
    """Prefixes and trees of the clips, padded to buckets.

    The prefixes are as `pack_rows` gives them, a clip a row. Of the trees, int32 [B, T]: `tree_tokens`;
    `tree_positions`; `tree_order` and `tree_label`, from 1, 0 where there is no order (padding) or no label (the rest
    of a question). Of the likelihoods, int32 [B, G]: the slot `before` the token whose likelihood is asked for, and
    the token, `target`, -1 where there is none.
    """
    shared = [_shared(prompts) for prompts in asked]
    idle = [[]] * (power_of_two(len(asked)) - len(asked))
    prefixes = [[_cut(prompts[0], length)] for prompts, length in zip(asked, shared, strict=True)]
    longest = prefix or bucket(max(shared))
    rows = pack_rows(prefixes + idle, length=longest, clips_per_row=1, soft_per_clip=soft_per_clip)
    batch = {name: getattr(rows, name) for name in ("tokens", "soft_index", "segment_ids", "positions")}
    trees = [_tree(prompts, length, answers) for prompts, length in zip(asked, shared, strict=True)]
    slots = bucket(max(len(columns) for columns, _ in trees))
    padded = np.zeros((len(prefixes + idle), slots, 4), np.int32)
    likelihoods = np.full((len(padded), bucket(len(trees[0][1])), 2), (0, -1), np.int32)
    for b, (columns, asks) in enumerate(trees):
        padded[b, : len(columns)], likelihoods[b, : len(asks)] = columns, asks
    names = ("tree_tokens", "tree_positions", "tree_order", "tree_label")
    batch |= dict(zip(names, np.moveaxis(padded, -1, 0), strict=True))
    return batch | {"before": likelihoods[..., 0], "target": likelihoods[..., 1]}


def _shared(prompts: Sequence[Sample]) -> int:
    """With how many tokens all prompts begin; at least one stays for the tree of each."""
    shortest = min(len(prompt.tokens) for prompt in prompts)
    first = prompts[0].tokens[: shortest - 1]
    differs = np.any([prompt.tokens[: shortest - 1] != first for prompt in prompts], axis=0)
    return int(differs.argmax()) if differs.any() else shortest - 1


def _cut(prompt: Sample, length: int) -> Sample:
    return Sample(prompt.tokens[:length], prompt.soft[:length], prompt.is_answer[:length])


def _tree(prompts: Sequence[Sample], shared: int, answers: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(token, position, order, label) of a clip's tree, [T, 4], and (before, target) of its likelihoods, [G, 2]."""
    columns: list[tuple[int, int, int, int]] = []
    longest = max(map(len, answers))
    asks = np.full((len(prompts), len(answers), longest, 2), (0, -1), np.int32)
    for order, prompt in enumerate(prompts):
        rest = prompt.tokens[shared:].tolist()
        columns += [(token, shared + i, order + 1, 0) for i, token in enumerate(rest)]
        question_end = len(columns) - 1
        for label, answer in enumerate(answers):
            start, position = len(columns), len(prompt.tokens)
            columns += [(token, position + i, order + 1, label + 1) for i, token in enumerate(answer[:-1])]
            asks[order, label, : len(answer), 0] = [question_end, *range(start, start + len(answer) - 1)]
            asks[order, label, : len(answer), 1] = answer
    return np.array(columns, np.int32), asks.reshape(-1, 2)
