"""How likely each of some answers is behind prompts that begin alike: no token is run twice.

Axes: N clips, B rows (clips padded to a power of two), P prefix slots, T tree slots, S soft tokens, D width, V prompts
of a clip, L answers, A tokens of all answers with their ends, G likelihoods of a row: V A.

A clip's longest prompt is its prefix, and what the other prompts and the answers add to it is a tree of tokens, packed
into one row and run against the prefix's keys and values:

    prefix   IMAGE "Oh no. Which one: happy, sad? [/INST]"
                │                                   ├── "happy"
                │                                   └── "sad"
    tree        └── "Which one: happy, sad? [/INST]" ── "happy"
                                                    └── "sad"

A token sees the prefix up to where its branch leaves it, and what lies between it and there. The ends of answers are
predicted, never read. Where the prompts of all clips begin alike, as those without an image do, one prefix serves all.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int

from emollama_jax.data.packing import pack_rows
from emollama_jax.infer.shapes import bucket, power_of_two
from emollama_jax.models.emotion_llama import insert_soft_tokens
from emollama_jax.models.llama import Llama
from emollama_jax.text.prompts import Sample

TREE_STEP = 64  # trees are padded to a multiple of it, smaller ones to a power of two
MAX_TREE = 1024  # attention's memory grows with the square of a tree: where it needs a longer one, prompts are divided
NODE = ("token", "position", "soft", "seen", "below")


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
    shared_soft: int | None = None,
    length: int | None = None,
) -> Likelihoods:
    """Score every answer behind every prompt of every clip.

    Args:
        asked: the prompts of each clip, as many for each; `Sample.soft` are indices into the clip's soft tokens.
        answers: the tokens of each answer, with its end.
        shared_soft: how many soft tokens, from the first on, have the same values for all clips; where that is given,
            what all prompts begin with, up to the first other soft token, is run once as the prefix of all clips.
        length: P; what a prefix has more is of the tree. Default: as the longest prefix needs.
    """
    if not asked:
        return Likelihoods(np.zeros((0, 0, len(answers))), np.zeros(0))
    found, tokens = [], np.zeros(len(asked))
    for trees in _passes(asked, answers, shared_soft, length):
        batch = _batch(trees, soft.shape[1], shared_soft, length)
        nll = _on_host(_nll(*nnx.split(model), batch, _padded(soft, batch)))
        found.append(nll[: len(asked)].astype(np.float64))
        share = 1 if shared_soft is None else len(asked)
        tokens += [len(tree.prefix.tokens) / share + len(tree.nodes) for tree in trees]
    of_tokens = np.concatenate(found, axis=1).reshape(len(asked), len(asked[0]), -1)
    starts = np.cumsum([0, *map(len, answers[:-1])])
    return Likelihoods(-np.add.reduceat(of_tokens, starts, axis=-1), tokens)


def compile_likelihoods(
    model: Llama,
    asked: Sequence[Sequence[Sample]],
    soft: Float[Array, "N S D"],
    answers: Sequence[Sequence[int]],
    *,
    length: int,
) -> None:
    """Compile the programs that `answer_likelihoods` runs, without running them."""
    for trees in _passes(asked, answers, None, length):
        batch = _batch(trees, soft.shape[1], None, length)
        _nll.lower(*nnx.split(model), batch, _padded(soft, batch)).compile()


def _padded(soft: Float[Array, "N S D"], batch: dict[str, np.ndarray]) -> Float[Array, "B S D"]:
    idle = len(batch["tree_token"]) - len(soft)
    return jnp.pad(soft, ((0, idle), (0, 0), (0, 0))) if idle else soft


def _on_host(x: jax.Array) -> np.ndarray:
    """The whole of an array that may be spread over several processes, in each of them."""
    return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)


@functools.partial(jax.jit, static_argnames="graphdef")
def _nll(graphdef, state, batch, soft):
    """Negative log-likelihoods [B, G] of the answers' tokens."""
    model: Llama = nnx.merge(graphdef, state)
    prefixes, prefix_slots = batch["tokens"].shape
    x = insert_soft_tokens(model.embed_tokens(batch["tokens"]), soft[:prefixes], batch["soft_index"])
    _, cache = model.prefill(x, (batch["segment_ids"] > 0).sum(axis=1), prefix_slots)
    x = insert_soft_tokens(model.embed_tokens(batch["tree_token"]), soft, batch["tree_soft"])
    slots = jnp.arange(x.shape[1])
    behind = slots[:, None] - slots
    visible = (behind >= 0) & (behind <= batch["tree_below"][:, None, :])
    hidden = model.branch(x, cache, batch["tree_position"], batch["tree_seen"], visible)
    before = jnp.take_along_axis(hidden, batch["before"][..., None], axis=1)
    return model.token_nll(before, batch["target"])


@dataclass(frozen=True, slots=True)
class _Tree:
    """What is read for a clip."""

    prefix: Sample
    nodes: Int[np.ndarray, "T 5"]
    """The tokens of the tree, depth first, each with what `NODE` names: its id, position and soft token (-1 at text),
    how many tokens of the prefix it sees, and how many nodes are below it, in its branches: they are the next ones."""
    asks: Int[np.ndarray, "G 2"]
    """For each prompt, answer and token of it: the node before the token, and the token."""


def _passes(
    asked: Sequence[Sequence[Sample]], answers: Sequence[Sequence[int]], shared_soft: int | None, length: int | None
) -> Iterator[list[_Tree]]:
    """The trees of the clips, of as many of their prompts at once as `MAX_TREE` allows."""
    longest = [max(prompts, key=lambda prompt: len(prompt.tokens)) for prompts in asked]
    sizes = [len(prompt.tokens) - 1 for prompt in longest]  # the last token is of the tree, as is all that is asked
    if shared_soft is not None:
        longest = longest[:1] * len(asked)
        own = int(np.append(longest[0].soft >= shared_soft, True).argmax())
        sizes = [min(own, *(_common(longest[0], prompt) for prompts in asked for prompt in prompts))] * len(asked)
    prefixes = [_cut(prompt, min(size, length or size)) for prompt, size in zip(longest, sizes, strict=True)]
    trees = [_tree(prefix, prompts, answers) for prefix, prompts in zip(prefixes, asked, strict=True)]
    half = len(asked[0]) // 2
    if half and max(len(tree.nodes) for tree in trees) > MAX_TREE:
        for part in (slice(half), slice(half, None)):
            yield from _passes([prompts[part] for prompts in asked], answers, shared_soft, length)
    else:
        yield trees


def _common(a: Sample, b: Sample) -> int:
    """With how many tokens, soft ones included, both begin; the last one of `b` is left out."""
    most = min(len(a.tokens), len(b.tokens) - 1)
    differs = (a.tokens[:most] != b.tokens[:most]) | (a.soft[:most] != b.soft[:most])
    return int(differs.argmax()) if differs.any() else most


def _cut(prompt: Sample, length: int) -> Sample:
    return Sample(prompt.tokens[:length], prompt.soft[:length], prompt.is_answer[:length])


def _tree(prefix: Sample, prompts: Sequence[Sample], answers: Sequence[Sequence[int]]) -> _Tree:
    paths: dict[tuple[int, int], tuple] = {}  # the nodes to an answer's last token, by prompt and answer
    for p, prompt in enumerate(prompts):
        seen = _common(prefix, prompt)
        rest = list(zip(prompt.tokens[seen:].tolist(), prompt.soft[seen:].tolist(), strict=True))
        for a, answer in enumerate(answers):
            tokens = [*rest, *((token, -1) for token in answer[:-1])]
            paths[p, a] = tuple((token, seen + i, soft, seen) for i, (token, soft) in enumerate(tokens))
    nodes: list[tuple[int, int, int, int]] = []
    below: dict[int, int] = {}
    slots: dict[tuple, list[int]] = {}
    before: tuple = ()
    for path in sorted(set(paths.values())):  # beside each other are those that have most in common
        shared = next((i for i, (a, b) in enumerate(zip(before, path, strict=False)) if a != b), len(before))
        start = len(nodes)
        nodes += path[shared:]
        slots[path] = [*slots.get(before, [])[:shared], *range(start, len(nodes))]
        below |= {node: len(nodes) - 1 - node for node in slots[path]}
        before = path
    asks = [
        ask for (_, a), path in paths.items() for ask in zip(slots[path][-len(answers[a]) :], answers[a], strict=True)
    ]
    with_below = [(*node, below[slot]) for slot, node in enumerate(nodes)]
    return _Tree(prefix, np.array(with_below, np.int32), np.array(asks, np.int32))


def _batch(
    trees: Sequence[_Tree], soft_per_clip: int, shared_soft: int | None, length: int | None
) -> dict[str, np.ndarray]:
    """Prefixes and trees of the clips, padded to buckets.

    The prefixes are as `pack_rows` gives them, a clip a row, or a single row. Of the trees, int32 [B, T]: `tree_token`
    and so on, as in `NODE`. Of the likelihoods, int32 [B, G]: the node `before` the token whose likelihood is asked
    for, and the token, `target`.
    """
    rows = power_of_two(len(trees))
    prefixes = [[tree.prefix] for tree in trees] + [[]] * (rows - len(trees))
    prefixes = prefixes if shared_soft is None else prefixes[:1]
    slots = length or bucket(max(len(tree.prefix.tokens) for tree in trees))
    packed = pack_rows(prefixes, length=slots, clips_per_row=1, soft_per_clip=soft_per_clip)
    longest = max(len(tree.nodes) for tree in trees)
    slots = bucket(longest) if longest <= TREE_STEP else -(-longest // TREE_STEP) * TREE_STEP
    nodes = np.zeros((rows, slots, len(NODE)), np.int32)
    nodes[..., NODE.index("soft")] = -1
    asks = np.zeros((rows, *trees[0].asks.shape), np.int32)
    for b, tree in enumerate(trees):
        nodes[b, : len(tree.nodes)], asks[b] = tree.nodes, tree.asks
    batch = {name: getattr(packed, name) for name in ("tokens", "soft_index", "segment_ids")}
    batch |= {f"tree_{name}": column for name, column in zip(NODE, np.moveaxis(nodes, -1, 0), strict=True)}
    return batch | {"before": asks[..., 0], "target": asks[..., 1]}
