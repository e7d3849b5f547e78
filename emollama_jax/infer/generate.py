"""The compiled programs of text generation: prefill of prompts, decoding of a batch whose rows join and leave.

A `DecodeState` is a batch of requests between two tokens. Its rows are independent: each has its own length, settings,
seed and number of tokens so far, so a row's tokens do not depend on the other rows. `SlotBatcher` (infer/slots.py)
decides which request sits in which row.

Axes: B rows, P prompt tokens (padded at the end to a bucket), C cache slots, T decoded tokens, V vocabulary, S soft
tokens, D width, K alternatives of a token.
"""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from emollama_jax.infer.sampling import Sampling, TokenLogprobs, sample, token_logprobs
from emollama_jax.models.emotion_llama import insert_soft_tokens
from emollama_jax.models.llama import KVCache, Llama


@jax.tree_util.register_dataclass
@dataclass
class DecodeState:
    """A batch between two tokens: `token` [B] is sampled but not yet in the cache.

    `seen` marks the tokens that the repetition penalty counts, `step` is the number of tokens sampled so far. A row
    that is `done` has no request, or one that is finished: it samples no more tokens and its cache does not grow.
    """

    cache: KVCache
    token: Int[Array, " B"]
    seen: Bool[Array, "B V"]
    done: Bool[Array, " B"]
    step: Int[Array, " B"]
    sampling: Sampling
    logprobs: TokenLogprobs | None = None
    """Of the T tokens that a program has just sampled, in rows whose `sampling` asks for it; no program reads them."""


@functools.partial(jax.jit, static_argnames=("graphdef", "cache_size"))
def prefill(graphdef, state, tokens, lengths, soft_index, soft, sampling, eos_ids, *, cache_size) -> DecodeState:
    """Run prompts and sample the first token of every answer.

    Args:
        tokens: i32 [B, P], padded at the end.
        lengths: i32 [B], the tokens of each prompt; 0 for a row without request, which is done.
        soft_index: i32 [B, P], the index of a position's soft token, -1 at text.
        soft: [B, S, D], or the [S, D] of each row; None where no prompt has soft tokens.
        sampling: the rows' settings.
        eos_ids: i32 [E], the ids that end an answer.
        cache_size: C, at least P.
    """
    model: Llama = nnx.merge(graphdef, state)
    x = model.embed_tokens(tokens)
    soft = jnp.stack(soft) if isinstance(soft, list) else soft
    x = x if soft is None else insert_soft_tokens(x, soft, soft_index)
    hidden, cache = model.prefill(x, lengths, cache_size)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    rows = jnp.arange(tokens.shape[0])[:, None]
    counts = jnp.arange(tokens.shape[1]) < (lengths[:, None] if soft is None else 0)
    counts = jnp.broadcast_to(counts, tokens.shape)  # a text's prompt counts as seen, that of a clip does not
    seen = jnp.zeros((tokens.shape[0], model.config.vocab_size), bool).at[rows, tokens].max(counts)
    blank = DecodeState(cache, tokens[:, 0], seen, lengths == 0, jnp.zeros_like(lengths), sampling)
    decode, logprobs = _next_token(model.logits(last), blank, eos_ids)
    return dataclasses.replace(decode, logprobs=jax.tree.map(lambda x: x[:, None], logprobs))


@functools.partial(jax.jit, static_argnames=("graphdef", "length"), donate_argnames=("decode",))
def decode_chunk(graphdef, state, decode, eos_ids, *, length) -> tuple[DecodeState, Int[Array, "B T"]]:
    """Sample up to `length` tokens of every row that is not done: the state, and the tokens, -1 where there is none."""
    model: Llama = nnx.merge(graphdef, state)

    def one_token(carry):
        decode, (out, logprobs), i = carry
        hidden, cache = model.extend(model.embed_tokens(decode.token[:, None]), decode.cache)
        cache = dataclasses.replace(cache, length=jnp.where(decode.done, decode.cache.length, cache.length))
        decode = dataclasses.replace(decode, cache=cache)
        decode, new = _next_token(model.logits(hidden[:, -1]), decode, eos_ids)
        logprobs = jax.tree.map(lambda x, new: x.at[:, i].set(new), logprobs, new)
        return decode, (out.at[:, i].set(decode.token), logprobs), i + 1

    unfinished = lambda carry: (carry[2] < length) & ~jnp.all(carry[0].done)
    out = jnp.full((decode.token.shape[0], length), -1, jnp.int32)
    decode = dataclasses.replace(decode, logprobs=None)
    logprobs = TokenLogprobs.zeros(out.shape, model.config.vocab_size)
    decode, (out, logprobs), _ = jax.lax.while_loop(unfinished, one_token, (decode, (out, logprobs), 0))
    return dataclasses.replace(decode, logprobs=logprobs), out


@functools.partial(jax.jit, donate_argnames=("decode",))
def insert(decode: DecodeState, new: DecodeState, rows: Int[Array, " R"]) -> DecodeState:
    """Put the R requests of `new`, whose cache has as many slots or fewer, into the given rows of `decode`; a row
    number beyond the last drops the request."""
    slots = new.cache.k.shape[2]
    put = lambda old, values: old.at[rows].set(values, mode="drop")
    put_cache = lambda old, values: old.at[:, rows, :slots].set(values, mode="drop")
    cache = KVCache(
        k=put_cache(decode.cache.k, new.cache.k),
        v=put_cache(decode.cache.v, new.cache.v),
        length=put(decode.cache.length, new.cache.length),
    )
    others = {field.name for field in dataclasses.fields(DecodeState)} - {"cache"}
    changed = {name: jax.tree.map(put, getattr(decode, name), getattr(new, name)) for name in others}
    return DecodeState(cache=cache, **changed)


@functools.partial(jax.jit, static_argnames="cache_size")
def rearrange(decode: DecodeState, rows: Int[Array, " R"], *, cache_size: int) -> DecodeState:
    """A batch of R rows with `cache_size` slots: those of `decode` with the given numbers, done where -1. More slots
    than the rows use must fit in."""
    take = lambda x: jnp.take(x, jnp.maximum(rows, 0), axis=0)

    def take_cache(x):
        x = jnp.take(x, jnp.maximum(rows, 0), axis=1)[:, :, :cache_size]
        return jnp.pad(x, ((0, 0), (0, 0), (0, cache_size - x.shape[2]), (0, 0), (0, 0)))

    cache = KVCache(take_cache(decode.cache.k), take_cache(decode.cache.v), take(decode.cache.length))
    others = {field.name for field in dataclasses.fields(DecodeState)} - {"cache"}
    taken = DecodeState(cache=cache, **{name: jax.tree.map(take, getattr(decode, name)) for name in others})
    return dataclasses.replace(taken, done=taken.done | (rows < 0))


@functools.partial(jax.jit, donate_argnames="decode")
def stop(decode: DecodeState, row: Int[Array, ""]) -> DecodeState:
    """The batch with a row done, whose request is cancelled."""
    return dataclasses.replace(decode, done=decode.done.at[row].set(True))


def _next_token(logits, decode: DecodeState, eos_ids) -> tuple[DecodeState, TokenLogprobs]:
    settings = decode.sampling
    active = dataclasses.replace(settings, temperature=jnp.where(decode.done, 0, settings.temperature))
    token = jnp.where(decode.done, -1, sample(logits, decode.seen, decode.step, active))  # -1: no token of this row
    step = decode.step + 1
    logprobs = token_logprobs(logits, token, settings.logprobs & ~decode.done)
    decode = dataclasses.replace(
        decode,
        token=token,
        seen=decode.seen.at[jnp.arange(token.shape[0]), token].set(True),  # of a row that is done, nothing is read
        done=decode.done | jnp.isin(token, eos_ids) | (step >= settings.max_new_tokens),
        step=step,
    )
    return decode, logprobs
