"""Attention on CPUs: few heads or a block of queries at a time, so that the scores stay in the processor's cache.

Axes: B batch, T tokens, S keys, N heads, K key/value heads (N a multiple of K), G = N / K, H head size, Q queries of a
block, W keys of a window.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

SCORES = 2**19  # scores that exist at once: 2 MiB
BLOCK = 128  # queries of a packed row that are computed at once, at most


def masked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    visible: Bool[Array, "B V S"],
) -> Float[Array, "B T N H"]:
    """Attention of every query on the keys that `visible` marks, one or more, with scale 1/sqrt(H); V is T, or 1 where
    all queries see the same. The backward pass recomputes the weights, which cost more to keep than to compute."""
    (length, heads, head_dim), keys = q.shape[1:], k.shape[1]

    def of_row(row):
        *qkv, visible = row
        of_head = jax.checkpoint(lambda head: _attend(*head, visible))
        return jax.lax.map(of_head, qkv, batch_size=_heads_at_once(heads, length * keys))

    y = jax.lax.map(of_row, (*(x.swapaxes(1, 2) for x in (q * head_dim**-0.5, k, v)), visible))
    return y.swapaxes(1, 2)


def packed_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Causal attention within the segments of packed rows, with scale 1/sqrt(H).

    A block of queries is computed against a window of keys, which ends with the block and begins at the first of its
    segments or a little before: of a row of many short segments, most scores are never computed.
    """
    (length, heads, head_dim), kv_heads = q.shape[1:], k.shape[2]
    blocks = -(-length // BLOCK)
    block = -(-length // blocks)
    fill = lambda x: jnp.pad(x, [(0, 0), (0, blocks * block - length)] + [(0, 0)] * (x.ndim - 2))
    q, k, v, segment_ids = map(fill, (q * head_dim**-0.5, k, v, segment_ids))
    by_head = lambda x: x.reshape(*x.shape[:2], kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]

    def of_row(row):
        q, k, v, segment_ids = row
        first = _first_keys(segment_ids, blocks)
        of_head = lambda head: _packed_head(*head, segment_ids, first)
        at_once = _heads_at_once(kv_heads, heads // kv_heads * block * len(segment_ids))
        return jax.lax.map(of_head, (q, k[:, 0], v[:, 0]), batch_size=at_once)

    y = jax.lax.map(of_row, (*map(by_head, (q, k, v)), segment_ids))
    return y.transpose(0, 3, 1, 2, 4).reshape(q.shape)[:, :length]


def _heads_at_once(heads: int, scores: int) -> int:
    return max(1, min(heads, SCORES // scores))


def _attend(q, k, v, visible):
    """[Q, H] queries on [W, H] keys and values, of which `visible` [Q or 1, W] marks those that a query sees."""
    scores = jnp.matmul(q, k.T, preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores, -jnp.inf)
    # Normalised before they are rounded: the gradient of a sum of other numbers than those of the product is wrong.
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.matmul(weights, v, preferred_element_type=jnp.float32).astype(v.dtype)


# -- packed rows


def _first_keys(segment_ids: Int[Array, " T"], blocks: int) -> Int[Array, " blocks"]:
    """The first token of a row that any query of each block sees."""
    tokens = np.arange(len(segment_ids))
    of_queries = jnp.where(segment_ids[:, None] == segment_ids, tokens, len(tokens)).min(axis=1)
    return of_queries.reshape(blocks, -1).min(axis=1)


def _windows(blocks: int) -> list[int]:
    """Lengths of windows, in blocks: the powers of two and the numbers halfway between them, up to the whole row. They
    are few, as a program is compiled for each."""
    lengths = sorted({n for i in range(blocks.bit_length()) for n in (2**i, 3 * 2**i // 2)})
    return [n for n in lengths if n < blocks] + [blocks]


def _in_window(of_window: Callable, block: Int[Array, ""], first: Int[Array, ""], blocks: int, size: int):
    """`of_window(start, length)` of the shortest window that holds a block's keys from `first` on; its length is
    static."""
    windows = size * np.array(_windows(blocks))
    end = (block + 1) * size
    branch = lambda window: lambda: of_window(jnp.maximum(end - window, 0), window)
    return jax.lax.switch((windows < end - first).sum(), [branch(int(window)) for window in windows])


def _block(x: Array, block: Int[Array, ""], size: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, block * size, size, axis)


def _attend_in_window(q, k, v, segment_ids, block, start):
    """[G, Q, H] queries of a block on [W, H] keys and values, which begin at token `start` of the row."""
    groups, size, head_dim = q.shape
    queries, keys = block * size + jnp.arange(size), start + jnp.arange(len(k))
    of_keys = jax.lax.dynamic_slice_in_dim(segment_ids, start, len(k))
    visible = (_block(segment_ids, block, size, 0)[:, None] == of_keys) & (keys <= queries[:, None])
    return _attend(q.reshape(-1, head_dim), k, v, jnp.tile(visible, (groups, 1))).reshape(q.shape)


@jax.custom_vjp
def _packed_head(q, k, v, segment_ids, first):
    """[G, T, H] queries on [T, H] keys and values, of which the i-th block of queries sees none before `first[i]`."""
    blocks, size = len(first), len(k) // len(first)

    def of_block(i):
        def of_window(start, length):
            keys, values = (jax.lax.dynamic_slice_in_dim(x, start, length) for x in (k, v))
            return _attend_in_window(_block(q, i, size, 1), keys, values, segment_ids, i, start)

        return _in_window(of_window, i, first[i], blocks, size)

    y = jax.lax.map(of_block, jnp.arange(blocks))  # [blocks, G, Q, H]
    return y.swapaxes(0, 1).reshape(q.shape)


def _forward(*inputs):
    return _packed_head(*inputs), inputs


def _backward(inputs, dy):
    """The same blocks and windows; those of the keys' and values' gradients overlap and add up, in float32."""
    q, k, v, segment_ids, first = inputs
    blocks, size = len(first), len(k) // len(first)

    def add(x, dx, start):
        here = jax.lax.dynamic_slice_in_dim(x, start, len(dx))
        return jax.lax.dynamic_update_slice_in_dim(x, here + dx.astype(x.dtype), start, 0)

    def of_block(sums, i):
        def of_window(start, length):
            keys, values = (jax.lax.dynamic_slice_in_dim(x, start, length) for x in (k, v))
            attend = lambda *qkv: _attend_in_window(*qkv, segment_ids, i, start)
            dq, *grads = jax.vjp(attend, _block(q, i, size, 1), keys, values)[1](_block(dy, i, size, 1))
            return [add(x, dx, start) for x, dx in zip(sums, grads, strict=True)], dq

        return _in_window(of_window, i, first[i], blocks, size)

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (k, v)]
    (dk, dv), dq = jax.lax.scan(of_block, zeros, jnp.arange(blocks))
    return dq.swapaxes(0, 1).reshape(q.shape), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_packed_head.defvjp(_forward, _backward)
