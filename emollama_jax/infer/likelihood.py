"""How likely each of some answers is behind prompts that begin alike: a shared prefix once, the rest as a packed tree.

Axes: N clips, B rows (clips padded to a power of two), P prefix slots, T tree slots, S soft tokens, D width, V prompts
of a clip (variants), L answers, E tokens of an answer with its end, G likelihoods of a row: V L E, padded to a bucket.

What all prompts of a clip begin with, soft tokens included, is run once. All that follows is a tree, packed into one
row and run against the prefix's keys and values:

    prefix ── prompt 1: "happy, sad. [/INST]" ── "happy"
           │                                  └─ "sad"
           └─ prompt 2: "sad, happy. [/INST]" ── "sad"
                                              └─ "happy"

A token sees the prefix and what lies between it and the root. The ends of answers are predicted, never read. Where the
prompts of all clips begin alike, as those without an image do, one prefix serves all rows.
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

from emollama_jax.data.packing import pack_rows
from emollama_jax.infer.shapes import bucket, power_of_two
from emollama_jax.models.emotion_llama import insert_soft_tokens
from emollama_jax.models.llama import KVCache, Llama
from emollama_jax.text.prompts import Sample


@dataclass(frozen=True, slots=True)
class Likelihoods:
    """What `answer_likelihoods` finds."""

    log: Float[np.ndarray, "N V L"]
    """Log-likelihoods of the whole answers: their tokens, the last of which is the end of the sequence."""
    tokens: Float[np.ndarray, " N"]
    """Tokens that the model read for each clip, without padding; those read for all clips at once in equal parts."""


def answer_likelihoods(
    model: Llama,
    asked: Sequence[Sequence[Sample]],
    soft: Float[Array, "N S D"],
    answers: Sequence[Sequence[int]],
    *,
    one_prefix: bool = False,
    length: int | None = None,
) -> Likelihoods:
    """Score every answer behind every prompt of every clip.

    Args:
        asked: the prompts of each clip, as many for each; `Sample.soft` are indices into the clip's soft tokens.
        answers: the tokens of each answer, with its end.
        one_prefix: whether the prompts of all clips begin alike, by the values of their soft tokens, too: then their
            common prefix is run once, with the first clip's soft tokens.
        length: P, at least that of the longest prefix; default: its bucket.
    """
    shape = (len(asked), len(asked[0]) if asked else 0, len(answers))
    if not asked:
        return Likelihoods(np.zeros(shape), np.zeros(0))
    batch = _batch(asked, answers, soft.shape[1], one_prefix, length)
    nll = _on_host(_nll(*nnx.split(model), batch, _padded(soft, batch))).astype(np.float64)[: len(asked)]
    asked_for = shape[1] * shape[2] * max(map(len, answers))
    log = -nll[:, :asked_for].reshape(*shape, -1).sum(axis=-1)
    return Likelihoods(log, tokens_read(asked, answers, one_prefix=one_prefix))


def tokens_read(
    asked: Sequence[Sequence[Sample]], answers: Sequence[Sequence[int]], *, one_prefix: bool = False
) -> Float[np.ndarray, " N"]:
    """Return how many tokens `answer_likelihoods` reads for each clip, as `Likelihoods.tokens`."""
    shared, share = _prefixes(asked, one_prefix), len(asked) if one_prefix else 1
    read = sum(len(answer) - 1 for answer in answers)  # the end of an answer is predicted, never read
    of_tree = lambda prompts, length: sum(len(prompt.tokens) - length + read for prompt in prompts)
    return np.array([length / share + of_tree(prompts, length) for prompts, length in zip(asked, shared, strict=True)])


def compile_likelihoods(
    model: Llama,
    asked: Sequence[Sequence[Sample]],
    soft: Float[Array, "N S D"],
    answers: Sequence[Sequence[int]],
    *,
    length: int,
) -> None:
    """Compile the program that `answer_likelihoods` runs, without running it."""
    batch = _batch(asked, answers, soft.shape[1], False, length)
    _nll.lower(*nnx.split(model), batch, _padded(soft, batch)).compile()


def _padded(soft: Float[Array, "N S D"], batch: dict[str, np.ndarray]) -> Float[Array, "B S D"]:
    idle = len(batch["tree_tokens"]) - len(soft)
    return jnp.pad(soft, ((0, idle), (0, 0), (0, 0))) if idle else soft


def _on_host(x: jax.Array) -> np.ndarray:
    """The whole of an array that may be spread over several processes, in each of them."""
    return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)


@functools.partial(jax.jit, static_argnames="graphdef")
def _nll(graphdef, state, batch, soft):
    """Negative log-likelihoods [B, G] of the answers' tokens, 0 where an answer has none."""
    model: Llama = nnx.merge(graphdef, state)
    prefixes, prefix_slots = batch["tokens"].shape
    rows, tree_slots = batch["tree_tokens"].shape
    prefix_lengths = (batch["segment_ids"] > 0).sum(axis=1)
    x = insert_soft_tokens(model.embed_tokens(batch["tokens"]), soft[:prefixes], batch["soft_index"])
    _, cache = model.prefill(x, prefix_lengths, prefix_slots + tree_slots)
    if prefixes < rows:
        repeat = lambda x, axis: jnp.repeat(x, rows, axis=axis)
        cache = KVCache(repeat(cache.k, 1), repeat(cache.v, 1), repeat(cache.length, 0))
    variant, label = batch["tree_variant"], batch["tree_label"]
    in_tree = (variant[:, :, None] == variant[:, None, :]) & (jnp.arange(tree_slots) <= jnp.arange(tree_slots)[:, None])
    in_tree &= (label[:, None, :] == 0) | (label[:, :, None] == label[:, None, :])
    x = insert_soft_tokens(model.embed_tokens(batch["tree_tokens"]), soft, batch["tree_soft"])
    hidden, _ = model.extend(x, cache, batch["tree_positions"], in_tree)
    before = jnp.take_along_axis(hidden, batch["before"][..., None], axis=1)
    return jnp.where(batch["target"] >= 0, model.token_nll(before, jnp.maximum(batch["target"], 0)), 0)


def _batch(
    asked: Sequence[Sequence[Sample]],
    answers: Sequence[Sequence[int]],
    soft_per_clip: int,
    one_prefix: bool,
    prefix: int | None = None,
) -> dict[str, np.ndarray]:
    """Prefixes and trees of the clips, padded to buckets.

    The prefixes are as `pack_rows` gives them, a clip a row, or a single row. Of the trees, int32 [B, T]:
    `tree_tokens`; `tree_positions`; `tree_soft`, -1 at text; `tree_variant` and `tree_label`, from 1, 0 where there is
    no prompt (padding) or no answer (the rest of a prompt). Of the likelihoods, int32 [B, G]: the slot `before` the
    token whose likelihood is asked for, and the token, `target`, -1 where there is none.
    """
    shared = _prefixes(asked, one_prefix)
    count = power_of_two(len(asked))
    if one_prefix:
        prefixes = [[_cut(asked[0][0], shared[0])]]
    else:
        prefixes = [[_cut(prompts[0], length)] for prompts, length in zip(asked, shared, strict=True)]
        prefixes += [[]] * (count - len(asked))
    rows = pack_rows(prefixes, length=prefix or bucket(max(shared)), clips_per_row=1, soft_per_clip=soft_per_clip)
    batch = {name: getattr(rows, name) for name in ("tokens", "soft_index", "segment_ids", "positions")}
    trees = [_tree(prompts, length, answers) for prompts, length in zip(asked, shared, strict=True)]
    slots = bucket(max(len(columns) for columns, _ in trees))
    names = ("tree_tokens", "tree_positions", "tree_soft", "tree_variant", "tree_label")
    padded = np.zeros((count, slots, len(names)), np.int32)
    padded[..., names.index("tree_soft")] = -1
    likelihoods = np.full((count, bucket(len(trees[0][1])), 2), (0, -1), np.int32)
    for b, (columns, asks) in enumerate(trees):
        padded[b, : len(columns)], likelihoods[b, : len(asks)] = columns, asks
    batch |= dict(zip(names, np.moveaxis(padded, -1, 0), strict=True))
    return batch | {"before": likelihoods[..., 0], "target": likelihoods[..., 1]}


def _prefixes(asked: Sequence[Sequence[Sample]], one_prefix: bool) -> list[int]:
    """How long the common prefix of each clip's prompts is, or with `one_prefix` that of all."""
    if one_prefix:
        return [_shared([prompt for prompts in asked for prompt in prompts])] * len(asked)
    return [_shared(prompts) for prompts in asked]


def _shared(prompts: Sequence[Sample]) -> int:
    """With how many tokens, soft ones included, all prompts begin; at least one stays for the tree of each."""
    shortest = min(len(prompt.tokens) for prompt in prompts)
    begin = lambda prompt: np.stack([prompt.tokens[: shortest - 1], prompt.soft[: shortest - 1]])
    first = begin(prompts[0])
    differs = np.any([(begin(prompt) != first).any(axis=0) for prompt in prompts], axis=0)
    return int(differs.argmax()) if differs.any() else shortest - 1


def _cut(prompt: Sample, length: int) -> Sample:
    return Sample(prompt.tokens[:length], prompt.soft[:length], prompt.is_answer[:length])


def _tree(prompts: Sequence[Sample], shared: int, answers: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(token, position, soft, variant, label) of a clip's tree, [T, 5], and (before, target) of its likelihoods,
    [G, 2]."""
    columns: list[tuple[int, int, int, int, int]] = []
    longest = max(map(len, answers))
    asks = np.full((len(prompts), len(answers), longest, 2), (0, -1), np.int32)
    for variant, prompt in enumerate(prompts):
        rest = zip(prompt.tokens[shared:].tolist(), prompt.soft[shared:].tolist(), strict=True)
        columns += [(token, shared + i, index, variant + 1, 0) for i, (token, index) in enumerate(rest)]
        question_end = len(columns) - 1
        for label, answer in enumerate(answers):
            start, position = len(columns), len(prompt.tokens)
            columns += [(token, position + i, -1, variant + 1, label + 1) for i, token in enumerate(answer[:-1])]
            asks[variant, label, : len(answer), 0] = [question_end, *range(start, start + len(answer) - 1)]
            asks[variant, label, : len(answer), 1] = answer
    return np.array(columns, np.int32), asks.reshape(-1, 2)
