"""Attention kernels: causal over packed rows and on a cache (the decoder), and bidirectional (the encoders).

Axes: B batch, T tokens, S cache slots, N heads, K key/value heads (N a multiple of K), H head size.

In packed rows a query sees a key when both lie in the same segment and the key does not come later in the row. Segment
0 is padding. Positions within a segment rise along the row, so the order in the row is the order in the segment: no
kernel needs the positions themselves, which enter through the rotary embedding.

Which kernel runs is decided once, by `resolve_attention`, from the devices a model is made for. Nothing here looks at
the devices of the process.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import spmd
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from emollama_jax.errors import UserError
from emollama_jax.models.chunked_attention import masked_attention, packed_attention
from emollama_jax.sharding import partition_spec

KERNELS = ("auto", "xla", "cudnn", "splash", "splash_interpret", "chunked")
RESIDUALS = "attention_residuals"  # what splash attention keeps for its backward pass
SPLASH_BLOCKS = (512, 384, 256, 128)  # lengths of a block of splash attention, which takes whole blocks


def resolve_attention(
    kernel: str,
    *,
    causal: bool,
    platform: str,
    num_devices: int,
    head_dim: int,
    dtype: str,
    compute_capability: float = 0.0,
) -> str:
    """The kernel that a configured name stands for on the devices a model is made for.

    "auto" is the flash kernel of the platform where it takes the model: "splash" on TPUs, "cudnn" on GPUs
    from Ampere on for half precision and heads up to 128; "chunked" on a CPU, for the decoder on a single device only;
    otherwise "xla". "splash" away from TPUs is "splash_interpret". All other names stand for themselves.

    Args:
        platform: of the devices: "tpu", "gpu" (or "cuda") or "cpu".
        num_devices: devices of the mesh.
        head_dim: size H of a head.
        dtype: of queries, keys and values.
        compute_capability: of the GPU, as in 8.0; 0 for other devices.
    """
    if kernel == "splash" and platform != "tpu":
        return "splash_interpret"
    if kernel != "auto":
        return kernel
    if platform == "tpu":
        return "splash"
    if platform == "cpu" and (num_devices == 1 or not causal):
        return "chunked"
    takes_heads = head_dim <= 128 and head_dim % 8 == 0  # cuDNN's flash attention, forward and backward
    if platform in ("gpu", "cuda") and compute_capability >= 8.0 and dtype in ("bfloat16", "float16") and takes_heads:
        return "cudnn"
    return "xla"


def resolve_for_devices(kernel: str, devices: Iterable[Any], *, causal: bool, head_dim: int, dtype: str) -> str:
    """`resolve_attention` for devices, all of one kind, such as `mesh.devices.flat`.

    Raises:
        UserError: they do not compute in this dtype.
    """
    first, *others = devices
    if first.platform == "cpu" and dtype == "float16":
        raise UserError("compute_dtype=float16: processors do not multiply in it; set bfloat16 or float32")
    return resolve_attention(
        kernel,
        causal=causal,
        platform=first.platform,
        num_devices=1 + len(others),
        head_dim=head_dim,
        dtype=dtype,
        compute_capability=float(getattr(first, "compute_capability", 0)),
    )


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    *,
    kernel: str = "xla",
) -> Float[Array, "B T N H"]:
    """Causal attention of packed rows on themselves, with scale 1/sqrt(H) and the softmax in float32.

    Rows of a single token go through "xla" whatever the kernel.

    Args:
        kernel: "xla" runs everywhere, and is what "auto" means where nobody resolved it; "cudnn" is cuDNN's flash
            attention (GPU, half precision); "splash" is the Pallas kernel for TPUs and "splash_interpret" the same by
            Pallas's interpreter, on any device; "chunked" computes so few scores at a time that they stay in a CPU's
            cache.

    Raises:
        ValueError: the kernel is unknown, or does not take these shapes or dtypes.
    """
    if kernel not in KERNELS:
        raise ValueError(f"attention {kernel!r} is unknown; choose one of {', '.join(KERNELS)}")
    length = q.shape[1]
    if length == 1:
        kernel = "xla"
    elif kernel.startswith("splash"):
        return _splash(q, k, v, segment_ids, causal=True, interpret=kernel == "splash_interpret")
    elif kernel == "chunked":
        return packed_attention(q, k, v, segment_ids)
    visible = (segment_ids[:, :, None] == segment_ids[:, None, :]) & jnp.tri(length, dtype=bool)
    return _of_jax(kernel, q, k, v, mask=visible[:, None])


def cached_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cached_k: Float[Array, "C S K H"],
    cached_v: Float[Array, "C S K H"],
    seen: Int[Array, "B T"],
    visible: Bool[Array, "B T T"],
    *,
    kernel: str = "xla",
) -> Float[Array, "B T N H"]:
    """Attention of T new tokens on the first `seen[b, t]` cached tokens of their row and on those of the new ones that
    `visible` names (each names one or more), with scale 1/sqrt(H) and softmax in float32. The cache is only read; its
    C rows are B, or one that all share.

    Args:
        kernel: "chunked" as in `attention`, for two tokens or more; all others are "xla".
    """
    batch, length, heads, head_dim = q.shape
    slots, kv_heads = cached_k.shape[1:3]
    seen = jnp.concatenate([jnp.arange(slots) < seen[..., None], visible], axis=-1)
    cached_k, cached_v = (x.astype(q.dtype) for x in (cached_k, cached_v))
    if kernel == "chunked" and length > 1:
        rows = lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:]))
        keys, values = (jnp.concatenate([rows(x), new], axis=1) for x, new in ((cached_k, k), (cached_v, v)))
        keys, values = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (keys, values))
        return masked_attention(q, keys, values, seen)
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    score = lambda keys: jnp.einsum("btkgh,bskh->bkgts", q, keys, preferred_element_type=jnp.float32)  # repeats no row
    scores = head_dim**-0.5 * jnp.concatenate([score(cached_k), score(k)], axis=-1)
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    mix = lambda weights, values: jnp.einsum("bkgts,bskh->btkgh", weights, values, preferred_element_type=jnp.float32)
    y = mix(weights[..., :slots], cached_v) + mix(weights[..., slots:], v)
    return y.astype(q.dtype).reshape(batch, length, heads, head_dim)


def bidirectional_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    lengths: Int[Array, " B"] | None = None,
    *,
    kernel: str = "xla",
) -> Float[Array, "B T N H"]:
    """Attention of every token of a row on the row's first `lengths[b]` tokens (1 or more; default: all), with scale
    1/sqrt(H) and the softmax in float32. The output at tokens beyond `lengths[b]` is undefined.

    Args:
        kernel: as in `attention`.

    Raises:
        ValueError: the kernel is unknown, or does not take these shapes or dtypes.
    """
    if kernel not in KERNELS:
        raise ValueError(f"attention {kernel!r} is unknown; choose one of {', '.join(KERNELS)}")
    batch, length = q.shape[:2]
    if length == 1:
        kernel = "xla"
    elif kernel == "chunked" or kernel.startswith("splash"):
        seen = jnp.arange(length) < (length if lengths is None else lengths[:, None])
        seen = jnp.broadcast_to(seen, (batch, length))
        if kernel == "chunked":
            return masked_attention(q, k, v, seen[:, None])
        return _splash(q, k, v, seen.astype(jnp.int32), causal=False, interpret=kernel == "splash_interpret")
    return _of_jax(kernel, q, k, v, key_value_seq_lengths=lengths)


def _of_jax(kernel: str, q: Array, k: Array, v: Array, **masks: Array | None) -> Array:
    """JAX's own attention, by cuDNN or XLA. For XLA in float16 it asks for a product that only GPUs have: elsewhere
    float32 takes its place."""
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **masks)
    plain = functools.partial(jax.nn.dot_product_attention, implementation="xla", **masks)
    if q.dtype != jnp.float16:
        return plain(q, k, v)
    in_float32 = lambda *inputs: plain(*(x.astype(jnp.float32) for x in inputs)).astype(q.dtype)
    return jax.lax.platform_dependent(q, k, v, cuda=plain, default=in_float32)


def splash_padding(length: int) -> int:
    """Tokens that fill a row of `length` up to whole blocks of splash attention."""
    return min(-length % block for block in SPLASH_BLOCKS)


def _splash(q: Array, k: Array, v: Array, segment_ids: Array, *, causal: bool, interpret: bool) -> Array:
    """The Pallas kernel for TPUs, on rows filled up to whole blocks with tokens of segment 0, which no other sees."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, head_dim = q.shape[1], q.shape[3]
    padded = length + splash_padding(length)
    block = next(block for block in SPLASH_BLOCKS if padded % block == 0)
    sizes = splash.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), block),
        **dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq"), block),
    )
    if not causal:  # as [B, N, H, T]: encoders' heads are narrower than a tile, which their tokens fill
        by_tokens = dict.fromkeys(("q_layout", "k_layout", "v_layout"), splash.QKVLayout.SEQ_MINOR)
        sizes = dataclasses.replace(sizes, **by_tokens)
    one_head = (splash.CausalMask if causal else splash.FullMask)((padded, padded))

    def local(q, k, v, segment_ids):  # one device's rows and heads: [B, N, T, H]
        mask = splash.MultiHeadMask([one_head] * q.shape[1])
        kernel = splash.make_splash_mha(
            mask,
            head_shards=1,
            q_seq_shards=1,
            block_sizes=sizes,
            residual_checkpoint_name=RESIDUALS,
            interpret=interpret,
        )
        return jax.vmap(kernel)(q, k, v, splash.SegmentIds(segment_ids, segment_ids))

    mesh, rules = jax.sharding.get_abstract_mesh(), spmd.get_logical_axis_rules()
    fill = lambda x, axis: jnp.pad(x, [(0, padded - length if i == axis else 0) for i in range(x.ndim)])
    q, k, v = (checkpoint_name(fill(jnp.swapaxes(x, 1, 2), 2), RESIDUALS) for x in (q * head_dim**-0.5, k, v))
    segment_ids = fill(segment_ids, 1)
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
    return jnp.swapaxes(local(q, k, v, segment_ids)[:, :, :length], 1, 2)
