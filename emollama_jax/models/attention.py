"""Attention by backend: causal over packed rows (the decoder), and bidirectional (the encoders).

Axes: B batch, T queries, S keys, N heads, K key/value heads (N a multiple of K), H head size.

In packed rows a query sees a key when both lie in the same segment and the key does not come later in the row. Segment
0 is padding. Positions within a segment rise along the row, so the order in the row is the order in the segment: no
implementation needs the positions themselves, which enter through the rotary embedding.
"""

import math

import jax
import jax.numpy as jnp
from flax.core import spmd
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from emollama_jax.sharding import partition_spec

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash", "chunked")
BIDIRECTIONAL = ("auto", "xla", "cudnn", "chunked")
CHUNK_SCORES = 2**20  # scores that exist at once: 4 MiB
CHUNK_QUERIES = 256  # of a causal row that are worked on at once, with the keys up to the last of them
SPLASH_LANES = 128  # splash attention works on rows of a multiple of this length


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    q_segment_ids: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
    *,
    q_offset: int | Int[Array, ""] = 0,
    visible: Bool[Array, "B T S"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T N H"]:
    """Attention with scale 1/sqrt(H) and the softmax in float32.

    `q_offset` is the place of the first query among the keys: 0 for a row on itself, the number of keys already
    cached otherwise. `visible`, where given, names the keys that each query sees, in place of segments and order.
    `implementation`: "xla" runs everywhere; "cudnn" is cuDNN's flash attention (GPU, half precision); "splash" is the
    Pallas kernel for TPUs; "chunked" works on a few heads at a time, whose scores stay in a processor's cache; "auto"
    takes the flash kernel of the backend where it fits, and "chunked" on a single CPU device.
    These serve rows on themselves; queries against a cache and `visible` always go through "xla".

    Raises:
        ValueError: the kernel named does not take these shapes or dtypes.
    """
    if q.shape[1] != k.shape[1] or visible is not None:
        implementation = "xla"
    elif implementation == "auto":
        implementation = _best(q)
    if implementation == "splash":
        return _splash(q, k, v, q_segment_ids)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention {implementation!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "chunked":
        groups = q.shape[2] // k.shape[2]
        k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
        return _chunked(q, k, v, q_segment_ids[:, :, None] == kv_segment_ids[:, None, :], causal=True)
    if visible is None:
        same_segment = q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
        visible = same_segment & (jnp.arange(k.shape[1]) <= jnp.arange(q.shape[1])[:, None] + q_offset)
    return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None], implementation=implementation)


def bidirectional_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    lengths: Int[Array, " B"] | None = None,
    *,
    implementation: str = "auto",
) -> Float[Array, "B T N H"]:
    """Attention with scale 1/sqrt(H) and the softmax in float32, every token of a row on the first `lengths[b]` of it
    (1 or more; default: all). What the tokens beyond get means nothing.

    `implementation`: "xla" and "cudnn" as in `attention`; "chunked" works on a few heads at a time, whose scores stay
    in a processor's cache, and is what "auto" takes on CPUs.

    Raises:
        ValueError: the kernel named does not take these shapes or dtypes.
    """
    if implementation == "auto":
        implementation = "chunked" if jax.default_backend() == "cpu" else _best_bidirectional(q)
    if implementation == "chunked":
        seen = jnp.arange(q.shape[1]) < (q.shape[1] if lengths is None else lengths[:, None, None])
        return _chunked(q, k, v, jnp.broadcast_to(seen, (q.shape[0], 1, q.shape[1])))
    if implementation not in BIDIRECTIONAL:
        raise ValueError(f"attention {implementation!r} is unknown; choose one of {', '.join(BIDIRECTIONAL)}")
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation=implementation)


def _chunked(q: Array, k: Array, v: Array, visible: Array, *, causal: bool = False) -> Array:
    """`visible` [B, T or 1, T] names the keys that a query sees, of those that `causal` leaves it. The backward pass
    computes the weights again, which are more to keep than to compute."""
    length, heads, head_dim = q.shape[1:]
    step = CHUNK_QUERIES if causal else length

    def of_queries(q, k, v, visible):  # [t, H], [s, H], [t or 1, s]
        scores = jnp.matmul(q, k.T, preferred_element_type=jnp.float32)
        scores = jnp.where(visible, scores, -jnp.inf)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        y = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (y / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)

    def of_row(q, k, v, visible):  # [N, T, H], [T or 1, T]
        if causal:
            visible = visible & jnp.tri(length, dtype=bool)

        @jax.checkpoint
        def of_head(head):
            q, k, v = head
            parts = []
            for start in range(0, length, step):
                end = min(start + step, length)
                parts.append(of_queries(q[start:end], k[:end], v[:end], visible[start:end, :end]))
            return jnp.concatenate(parts)

        return jax.lax.map(of_head, (q, k, v), batch_size=max(1, min(heads, CHUNK_SCORES // length**2)))

    rows = [x.swapaxes(1, 2) for x in (q * head_dim**-0.5, k, v)]
    y = jax.lax.map(lambda row: of_row(*row), (*rows, visible))
    return y.swapaxes(1, 2)


def _best(q: Array) -> str:
    if jax.devices()[0].platform == "tpu" and q.shape[1] % SPLASH_LANES == 0:
        return "splash"
    if jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1:
        return "chunked"
    return _best_bidirectional(q)


def _best_bidirectional(q: Array) -> str:
    device, (_, length, _, head_dim) = jax.devices()[0], q.shape
    if device.platform == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and length > 1:
        # What cuDNN's flash attention takes, forward and backward, from Ampere on.
        if float(getattr(device, "compute_capability", 0)) >= 8.0 and head_dim <= 128 and head_dim % 8 == 0:
            return "cudnn"
    return "xla"


def _splash(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, head_dim = q.shape[1], q.shape[3]
    if length % SPLASH_LANES:
        raise ValueError(f"splash attention needs rows of a multiple of {SPLASH_LANES} tokens, not {length}")
    block = math.gcd(length, 512)
    sizes = splash.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), block),
        **dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq"), block),
    )

    def local(q, k, v, segment_ids):  # one device's rows and heads: [B, N, T, H]
        mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * q.shape[1])
        kernel = splash.make_splash_mha(
            mask, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=jax.default_backend() == "cpu"
        )
        return jax.vmap(kernel)(q, k, v, splash.SegmentIds(segment_ids, segment_ids))

    mesh, rules = jax.sharding.get_abstract_mesh(), spmd.get_logical_axis_rules()
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * head_dim**-0.5, k, v))
    if not mesh.empty and rules:
        spec_of = lambda x, heads: partition_spec(("batch", heads, None, None), x.shape, dict(mesh.shape), rules)
        q_spec, kv_spec = spec_of(q, "heads"), spec_of(k, "kv_heads")
        if q_spec != kv_spec:
            raise ValueError(
                f"splash attention cannot split {q.shape[1]} heads and {k.shape[1]} key/value heads alike on the "
                "tensor axis; use a smaller tensor axis or attention='xla'"
            )
        local = jax.shard_map(
            local,
            in_specs=(q_spec, kv_spec, kv_spec, PartitionSpec(q_spec[0], None)),
            out_specs=q_spec,
            check_vma=False,
        )
    return jnp.swapaxes(local(q, k, v, segment_ids), 1, 2)
