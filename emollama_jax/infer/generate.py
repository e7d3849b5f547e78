"""Text generation with a static cache: one compiled prefill and one compiled decode loop a bucket of lengths.

Axes: B requests, P prompt tokens (padded in front to a bucket), C cache slots, V vocabulary, S soft tokens, D width.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from emollama_jax.config import GenerateConfig
from emollama_jax.infer.sampling import Sampling, sample
from emollama_jax.models.emotion_llama import place
from emollama_jax.models.llama import KVCache, Llama
from emollama_jax.text.prompts import Sample

MIN_BUCKET = 16

Prompt = Sequence[int] | Sample


def bucket(length: int) -> int:
    """The compiled length that serves `length`: a power of two, and from 256 on also the one halfway to the next, so
    that rows longer than 128 are multiples of 128, as flash kernels want them."""
    power = max(MIN_BUCKET, 1 << (length - 1).bit_length())
    halfway = power * 3 // 4
    return halfway if halfway % 128 == 0 and length <= halfway else power


@jax.tree_util.register_dataclass
@dataclass
class DecodeState:
    """Between two tokens: `token` [B] is sampled but not yet in the cache, at `position` [B] of its request."""

    cache: KVCache
    token: Int[Array, " B"]
    position: Int[Array, " B"]
    seen: Bool[Array, "B V"]
    done: Bool[Array, " B"]
    step: Int[Array, ""]


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer: its tokens without the end-of-sequence id, and whether that id (rather than the limit) ended it."""

    tokens: tuple[int, ...]
    ended: bool


@functools.partial(jax.jit, static_argnames=("graphdef", "cache_size"))
def prefill(graphdef, state, tokens, soft_index, soft, segment_ids, sampling, eos_ids, *, cache_size):
    """Prompts [B, P], padded in front with segment 0, and their soft tokens [B, S, D] if there are any -> the first
    token of every answer, inside a DecodeState."""
    model: Llama = nnx.merge(graphdef, state)
    lengths = segment_ids.sum(axis=1)
    positions = jnp.maximum(jnp.arange(tokens.shape[1]) - (tokens.shape[1] - lengths)[:, None], 0)
    x = model.embed_tokens(tokens)
    x = x if soft is None else place(x, soft, soft_index)
    hidden, cache = model.prefill(x, positions, segment_ids, cache_size)
    rows = jnp.arange(tokens.shape[0])[:, None]
    counts = (segment_ids > 0) if soft is None else jnp.zeros_like(segment_ids, bool)
    seen = jnp.zeros((tokens.shape[0], model.config.vocab_size), bool).at[rows, tokens].max(counts)
    blank = DecodeState(cache, tokens[:, -1], lengths - 1, seen, lengths == 0, jnp.int32(0))
    return _next_token(model.logits(hidden[:, -1]), blank, sampling, eos_ids)


@functools.partial(jax.jit, static_argnames=("graphdef", "length"), donate_argnames=("decode",))
def decode_chunk(graphdef, state, decode, sampling, eos_ids, *, length):
    """Up to `length` tokens of every unfinished answer: (DecodeState, tokens [B, length], -1 where there is none)."""
    model: Llama = nnx.merge(graphdef, state)

    def one_token(carry):
        decode, out, i = carry
        tokens, positions = decode.token[:, None], decode.position[:, None]
        hidden, cache = model.extend(model.embed_tokens(tokens), positions, jnp.ones_like(tokens), decode.cache)
        decode = dataclasses.replace(decode, cache=cache)
        decode = _next_token(model.logits(hidden[:, -1]), decode, sampling, eos_ids)
        return decode, out.at[:, i].set(decode.token), i + 1

    unfinished = lambda carry: (carry[2] < length) & ~jnp.all(carry[0].done)
    out = jnp.full((decode.token.shape[0], length), -1, jnp.int32)
    decode, out, _ = jax.lax.while_loop(unfinished, one_token, (decode, out, 0))
    return decode, out


def _next_token(logits, decode: DecodeState, sampling: Sampling, eos_ids) -> DecodeState:
    token = sample(logits, decode.seen, decode.step, sampling)
    token = jnp.where(decode.done, -1, token)  # -1: this row said nothing
    ended = jnp.isin(token, eos_ids)
    step = decode.step + 1
    return dataclasses.replace(
        decode,
        token=token,
        position=decode.position + 1,
        seen=decode.seen.at[jnp.arange(token.shape[0]), token].set(True),  # -1 marks rows whose draws no longer count
        done=decode.done | ended | (step >= sampling.max_new_tokens),
        step=step,
    )


class Generator:
    """Batched generation from one model.

    A request's answer depends on its prompt, its settings and its seed, not on the requests beside it. A repetition
    penalty counts the prompt too, but not that of a clip, whose question lists the very labels it asks for.

    Args:
        model: the decoder; its parameters stay where they are placed.
        eos_ids: token ids that end an answer.
        chunk: tokens decoded on the device between two looks from the host; smaller streams more smoothly.
    """

    def __init__(self, model: Llama, *, eos_ids: Sequence[int], chunk: int = 8):
        self._model = model
        self._eos_ids = jnp.asarray(eos_ids, jnp.int32)
        self._chunk = chunk

    def generate(
        self,
        prompts: Sequence[Prompt],
        config: GenerateConfig | Sequence[GenerateConfig] = GenerateConfig(),
        seeds: Sequence[int] | None = None,
        *,
        soft: Float[Array, "N S D"] | None = None,
    ) -> list[Completion]:
        """The answers to `prompts`: token ids, BOS included where the model wants one, or samples about clips.

        Args:
            config: one for all, or one a prompt.
            seeds: each request's own randomness (default 0).
            soft: the soft tokens of each sample's clip (`EmotionLlama.soft_tokens`).
        """
        answers: list[list[int]] = [[] for _ in prompts]
        for new_tokens in self.stream(prompts, config, seeds, soft=soft):
            for answer, new in zip(answers, new_tokens, strict=True):
                answer.extend(new)
        eos = set(self._eos_ids.tolist())
        ended = [bool(answer) and answer[-1] in eos for answer in answers]
        return [Completion(tuple(a[:-1] if e else a), e) for a, e in zip(answers, ended, strict=True)]

    def stream(
        self,
        prompts: Sequence[Prompt],
        config: GenerateConfig | Sequence[GenerateConfig] = GenerateConfig(),
        seeds: Sequence[int] | None = None,
        *,
        soft: Float[Array, "N S D"] | None = None,
    ) -> Iterator[list[list[int]]]:
        """Each request's new tokens, as they come; an answer that ends does so with its end-of-sequence id."""
        configs = [config] * len(prompts) if isinstance(config, GenerateConfig) else list(config)
        seeds = [0] * len(prompts) if seeds is None else list(seeds)
        samples = [_as_sample(prompt) for prompt in prompts]
        self._check(samples, configs, seeds, soft)
        if not prompts:
            return
        count = 1 << (len(prompts) - 1).bit_length()  # rows are padded to a power of two: few programs compile
        tokens, soft_index, segment_ids = _left_pad(samples, count)
        if soft is not None:
            soft = jnp.pad(soft, ((0, count - len(prompts)), (0, 0), (0, 0)))
        idle = [dataclasses.replace(configs[0], temperature=0.0)] * (count - len(prompts))
        sampling = Sampling.of(configs + idle, seeds + [0] * len(idle))
        longest = max(c.max_new_tokens for c in configs)
        cache_size = tokens.shape[1] + bucket(longest)
        model = nnx.split(self._model)  # only now: adapters may have been merged since the last call
        decode = prefill(*model, tokens, soft_index, soft, segment_ids, sampling, self._eos_ids, cache_size=cache_size)
        new, finished = np.asarray(decode.token)[:, None], bool(jnp.all(decode.done))
        while True:
            yield [[int(t) for t in row if t >= 0] for row in new[: len(prompts)]]
            if finished:
                return
            decode, out = decode_chunk(*model, decode, sampling, self._eos_ids, length=self._chunk)
            new, finished = np.asarray(out), bool(jnp.all(decode.done))

    def _check(self, prompts: list[Sample], configs, seeds, soft) -> None:
        if not len(prompts) == len(configs) == len(seeds):
            raise ValueError(f"{len(prompts)} prompts, {len(configs)} configs and {len(seeds)} seeds do not match")
        if not all(0 <= seed < 2**32 for seed in seeds):
            raise ValueError(f"seeds {list(seeds)} must be at least 0 and below 2**32")
        vocab_size = self._model.config.vocab_size
        for i, prompt in enumerate(prompts):
            if not len(prompt.tokens):
                raise ValueError(f"prompt {i} is empty; begin it with the BOS id")
            if prompt.tokens.min() < 0 or prompt.tokens.max() >= vocab_size:
                raise ValueError(f"prompt {i} holds a token id outside the vocabulary of {vocab_size}")
            if prompt.soft.max() >= (0 if soft is None else soft.shape[1]):
                raise ValueError(f"prompt {i} asks for soft token {prompt.soft.max()}; give the clips' soft tokens")
        if soft is not None and len(soft) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and the soft tokens of {len(soft)} clips do not match")


def _as_sample(prompt: Prompt) -> Sample:
    if isinstance(prompt, Sample):
        return prompt
    tokens = np.array(prompt, np.int32)
    return Sample(tokens, np.full(len(tokens), -1, np.int32), np.zeros(len(tokens), bool))


def _left_pad(prompts: Sequence[Sample], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, soft index, segment ids) [count, P], every prompt at the right end; further rows are empty."""
    width = bucket(max(len(p.tokens) for p in prompts))
    tokens, soft_index, segment_ids = np.zeros((3, count, width), np.int32)
    soft_index[:] = -1
    for row, prompt in enumerate(prompts):
        here = np.s_[row, width - len(prompt.tokens) :]
        tokens[here], soft_index[here], segment_ids[here] = prompt.tokens, prompt.soft, 1
    return tokens, soft_index, segment_ids
