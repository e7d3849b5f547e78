"""The next token from logits, every row with its own settings and its own random numbers.

Axes: B rows, V vocabulary, K alternatives.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from emollama_jax.config import GenerateConfig

TOP_LOGPROBS = 20  # alternatives of a token, as chat-completion clients may ask for


@jax.tree_util.register_dataclass
@dataclass
class Sampling:
    """The sampling settings of a batch of requests, one entry a row."""

    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    max_new_tokens: Int[Array, " B"]
    seed: UInt32[Array, " B"]
    logprobs: Bool[Array, " B"]
    """Whether the request is to be told how likely its tokens were."""

    @classmethod
    def of(
        cls, configs: Sequence[GenerateConfig], seeds: Sequence[int], logprobs: Sequence[bool] | None = None
    ) -> "Sampling":
        put = lambda values, dtype: jax.device_put(np.asarray(values, dtype))  # jnp.asarray compiles for each length
        column = lambda name, dtype: put([getattr(config, name) for config in configs], dtype)
        return cls(
            temperature=column("temperature", np.float32),
            top_p=column("top_p", np.float32),
            repetition_penalty=column("repetition_penalty", np.float32),
            max_new_tokens=column("max_new_tokens", np.int32),
            seed=put(seeds, np.uint32),
            logprobs=put([False] * len(configs) if logprobs is None else logprobs, bool),
        )


@jax.tree_util.register_dataclass
@dataclass
class TokenLogprobs:
    """Log-probabilities of a token, and of the K most likely ones in its place, before temperature and penalties."""

    chosen: Float[Array, "*B"]
    top_ids: Int[Array, "*B K"]
    top: Float[Array, "*B K"]

    @classmethod
    def zeros(cls, shape: tuple[int, ...], vocab_size: int) -> "TokenLogprobs":
        many = (*shape, min(TOP_LOGPROBS, vocab_size))
        return cls(jnp.zeros(shape, jnp.float32), jnp.zeros(many, jnp.int32), jnp.zeros(many, jnp.float32))


def token_logprobs(logits: Float[Array, "B V"], token: Int[Array, " B"], wanted: Bool[Array, " B"]) -> TokenLogprobs:
    """Return the log-probabilities of `token`; zeros where no row wants them, at no cost."""
    rows, count = logits.shape[0], min(TOP_LOGPROBS, logits.shape[1])

    def compute():
        logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        chosen = jnp.take_along_axis(logprobs, jnp.maximum(token, 0)[:, None], axis=-1)[:, 0]
        top, ids = jax.lax.top_k(logprobs, count)
        return TokenLogprobs(chosen, ids.astype(jnp.int32), top)

    return jax.lax.cond(jnp.any(wanted), compute, lambda: TokenLogprobs.zeros((rows,), logits.shape[1]))


def sample(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], step: Int[Array, " B"], sampling: Sampling
) -> Int[Array, " B"]:
    """Sample the token after `logits`. `step` is the number of tokens a request has had, `seen` marks the tokens of its
    text so far. A draw depends on the row's seed and step, on nothing of other rows.

    In this order, as in Hugging Face's `generate`: the repetition penalty divides positive logits of seen tokens and
    multiplies negative ones (arXiv:1909.05858); the temperature divides all; nucleus sampling keeps the most likely
    tokens up to and with the one that reaches `top_p` (arXiv:1904.09751). Temperature 0 takes the most likely token.
    """
    penalty = sampling.repetition_penalty[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    greedy = jnp.argmax(logits, axis=-1)

    def draw():
        scaled = logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1)[:, None]
        descending = -jnp.sort(-scaled, axis=-1)
        probability = jax.nn.softmax(descending, axis=-1)
        kept = jnp.cumsum(probability, axis=-1) - probability < sampling.top_p[:, None]
        threshold = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        nucleus = jnp.where(scaled >= threshold, scaled, -jnp.inf)
        keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(sampling.seed, step)
        return jnp.where(sampling.temperature > 0, jax.vmap(jax.random.categorical)(keys, nucleus), greedy)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: greedy).astype(jnp.int32)
