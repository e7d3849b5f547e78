"""LLaMA decoder (arXiv:2302.13971, 2307.09288), with LoRA, as Emotion-LLaMA uses it.

Axes: B batch, T tokens, S cache slots, D width, N heads, K key/value heads, H head size, F MLP width, L layers,
V vocabulary. The parameters of all layers are stacked along a leading L.

The model is used in four ways, all of which take embeddings, so that image and feature tokens fit in:
  `model(x, positions, segment_ids)`            training and scoring: hidden states of packed rows
  `model.prefill(x, lengths, cache_size)`        one prompt a row, and keeps the keys and values
  `model.extend(x, cache)`                       further tokens after the cached ones
  `model.branch(x, cache, ...)`                  a tree of continuations of the cached ones
Logits are computed only where asked for, with `model.logits(hidden)` or inside `model.token_nll(hidden, targets)`.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from emollama_jax.fields import AFFECTS, check_fields, field
from emollama_jax.models import attention
from emollama_jax.models.layers import (
    FLOAT_DTYPES,
    INT8_PRODUCT,
    INT8_PRODUCTS,
    QUANTISED,
    Embedding,
    Linear,
    RMSNorm,
    computed_once,
    cos_and_sin,
    join_heads,
    rotary_angles,
    rotate,
    split_heads,
    swiglu,
)
from emollama_jax.models.lora import DROPOUT, LoRAConfig, LoRALinear
from emollama_jax.sharding import constrain

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(INT8_PRODUCT, attention.RESIDUALS, DROPOUT),
    ),
}
# What a projection's dropout folds into the block's key, and which half of the random bits are its own. A run that is
# resumed must draw the same: never renumber.
DROPOUT_BITS = {
    "q_proj": (0, 0),
    "v_proj": (0, 1),
    "k_proj": (1, 0),
    "o_proj": (1, 1),
    "gate_proj": (2, 0),
    "up_proj": (2, 1),
    "down_proj": (3, 0),
}

BlockKey = Key[Array, ""] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """Architecture and execution of the decoder; the defaults are LLaMA-2-7B."""

    vocab_size: int = field(32000, gt=0)
    """Rows of the embedding and columns of the head."""
    hidden_size: int = field(4096, gt=0)
    """Width D of the residual stream."""
    intermediate_size: int = field(11008, gt=0)
    """Width F of the SwiGLU MLP."""
    num_layers: int = field(32, gt=0)
    """Decoder blocks L."""
    num_heads: int = field(32, gt=0)
    """Attention heads N."""
    num_kv_heads: int = field(32, gt=0)
    """Key/value heads K; fewer than `num_heads` is grouped-query attention."""
    head_dim: int = field(128, gt=0)
    """Size H of a head."""
    rms_norm_eps: float = field(1e-5, gt=0)
    """Epsilon of the RMS norms."""
    rope_theta: float = field(10000.0, gt=0)
    """Base θ of the rotary embedding."""
    tie_embeddings: bool = False
    """Whether the head is the transposed embedding."""
    kernel_dtype: str = field("bfloat16", choices=FLOAT_DTYPES + QUANTISED, affects=AFFECTS)
    """Storage of the blocks' kernels: float32, bfloat16, float16, int8 or nf4."""
    int8_products: str = field("none", choices=INT8_PRODUCTS, affects=AFFECTS)
    """Which products with int8 kernels are of 8-bit integers, activations rounded token by token: none, forward
    (recomputation included) or all (also those of the activations' gradients)."""
    param_dtype: str = field("bfloat16", choices=FLOAT_DTYPES, affects=AFFECTS)
    """Storage of embedding, head and norms: float32, bfloat16 or float16."""
    compute_dtype: str = field("bfloat16", choices=FLOAT_DTYPES, affects=AFFECTS)
    """Dtype of activations; norms, softmax, logits and loss are float32 throughout."""
    scan_layers: bool = field(True, affects=("prediction", "execution"))
    """Compile one block and scan over it; false unrolls the layers."""
    remat: str = field("full", choices=tuple(REMAT_POLICIES), affects=("prediction", "execution"))
    """What the backward pass recomputes: none, full (all of a block) or dots (all but its matrix products, what dropout
    drew and, on TPUs, attention)."""
    attention: str = field("auto", choices=attention.KERNELS, affects=("prediction", "execution"))
    """Attention kernel: xla, cudnn, splash, splash_interpret or chunked; auto is chosen by the devices."""
    loss_chunk: int = field(256, gt=0, affects=("prediction", "execution"))
    """Tokens of each row whose logits exist at once in the loss."""

    def __post_init__(self):
        check_fields(self)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.int8_products != "none" and self.kernel_dtype != "int8":
            raise ValueError(
                f"int8_products={self.int8_products} takes int8 kernels, not {self.kernel_dtype}; set kernel_dtype=int8"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for the rotary embedding")

    def for_devices(self, devices: Iterable[Any]) -> "LlamaConfig":
        """The same with the attention kernel resolved for the devices that the model is made for."""
        kernel = attention.resolve_for_devices(
            self.attention, devices, causal=True, head_dim=self.head_dim, dtype=self.compute_dtype
        )
        return dataclasses.replace(self, attention=kernel)


@jax.tree_util.register_dataclass
@dataclass
class KVCache:
    """Keys and values of the tokens so far: slot s of row b holds those of the row's token s, while s < `length[b]`.
    What lies in later slots is never read."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]
    length: Int[Array, " B"]

    def append(self, k: Float[Array, "L B T K H"], v: Float[Array, "L B T K H"]) -> "KVCache":
        """Write T further tokens of every row behind the row's own last one."""
        batch, new = k.shape[1:3]
        rows, slots = jnp.arange(batch)[:, None], self.length[:, None] + jnp.arange(new)
        write = lambda cached, values: cached.at[:, rows, slots].set(values.astype(cached.dtype))
        return KVCache(write(self.k, k), write(self.v, v), self.length + new)


class LayerCache(NamedTuple):
    """One layer's part of a `KVCache`, and how many of its tokens and which of the T new ones each of these sees."""

    k: Float[Array, "C S K H"]
    v: Float[Array, "C S K H"]
    seen: Int[Array, "B T"]
    visible: Bool[Array, "B T T"]


def _linear(config: LlamaConfig, lora: LoRAConfig, name: str, sizes: tuple[int, int], axes, rngs) -> Linear:
    common = {
        "axes": axes,
        "kernel_dtype": config.kernel_dtype,
        "int8_products": config.int8_products,
        "num_layers": config.num_layers,
        "rngs": rngs,
    }
    if lora.rank and name in lora.targets:
        return LoRALinear(*sizes, lora=lora, **common)
    return Linear(*sizes, **common)


def _project(block: nnx.Module, name: str, x: Float[Array, "B T in"], key: BlockKey) -> Float[Array, "B T out"]:
    """One of a block's projections, its adapter with a dropout of its own where there is a key."""
    layer = getattr(block, name)
    if key is None or not isinstance(layer, LoRALinear):
        return layer(x)
    fold, half = DROPOUT_BITS[name]
    return layer(x, jax.random.fold_in(key, fold), half)


def _logits(hidden: Float[Array, "*B D"], head: Float[Array, "D V"]) -> Float[Array, "*B V"]:
    return jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, lora: LoRAConfig, *, rngs: nnx.Rngs):
        self.config = config
        d, n, k = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = _linear(config, lora, "q_proj", (d, n), ("embed", "heads"), rngs)
        self.k_proj = _linear(config, lora, "k_proj", (d, k), ("embed", "kv_heads"), rngs)
        self.v_proj = _linear(config, lora, "v_proj", (d, k), ("embed", "kv_heads"), rngs)
        self.o_proj = _linear(config, lora, "o_proj", (n, d), ("heads", "embed"), rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos_sin: Float[Array, "2 B T 1 H"],
        segment_ids: Int[Array, "B T"] | None,
        key: BlockKey,
        cached: LayerCache | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """(output, keys, values). With `cached` the tokens continue their rows, and `segment_ids` is not read."""
        cfg, project = self.config, lambda name, heads: split_heads(_project(self, name, x, key), heads)
        place = lambda y, axis: constrain(y, "batch", None, axis, None)
        q = rotate(place(project("q_proj", cfg.num_heads), "heads"), cos_sin)
        k = rotate(place(project("k_proj", cfg.num_kv_heads), "kv_heads"), cos_sin)
        v = place(project("v_proj", cfg.num_kv_heads), "kv_heads")
        if cached is None:
            y = attention.attention(q, k, v, segment_ids, kernel=cfg.attention)
        else:
            y = attention.cached_attention(q, k, v, *cached, kernel=cfg.attention)
        return _project(self, "o_proj", join_heads(y), key), k, v


class MLP(nnx.Module):
    """down(swiglu(gate(x), up(x)))."""

    def __init__(self, config: LlamaConfig, lora: LoRAConfig, *, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = _linear(config, lora, "gate_proj", (d, f), ("embed", "mlp"), rngs)
        self.up_proj = _linear(config, lora, "up_proj", (d, f), ("embed", "mlp"), rngs)
        self.down_proj = _linear(config, lora, "down_proj", (f, d), ("mlp", "mlp_out"), rngs)

    def __call__(self, x: Float[Array, "B T D"], key: BlockKey) -> Float[Array, "B T D"]:
        hidden = swiglu(_project(self, "gate_proj", x, key), _project(self, "up_proj", x, key))
        return _project(self, "down_proj", constrain(hidden, "batch", None, "mlp"), key)


class Block(nnx.Module):
    """One decoder layer; its parameters are stacked over all layers until a slice is merged in."""

    def __init__(self, config: LlamaConfig, lora: LoRAConfig, *, rngs: nnx.Rngs):
        norm = lambda: RMSNorm(
            config.hidden_size, epsilon=config.rms_norm_eps, dtype=config.param_dtype, num_layers=config.num_layers
        )
        self.attn_norm, self.mlp_norm = norm(), norm()
        self.attn = Attention(config, lora, rngs=rngs)
        self.mlp = MLP(config, lora, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos_sin: Float[Array, "2 B T 1 H"],
        segment_ids: Int[Array, "B T"] | None,
        key: BlockKey,
        cached: LayerCache | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """(output, keys, values), as `Attention`."""
        y, k, v = self.attn(self.attn_norm(x), cos_sin, segment_ids, key, cached)
        x = constrain(x + y, "batch", None, None)
        x = constrain(x + self.mlp(computed_once(self.mlp_norm(x)), key), "batch", None, None)
        return x, k, v


class Llama(nnx.Module):
    """The decoder with its embedding and head."""

    def __init__(self, config: LlamaConfig, lora: LoRAConfig = LoRAConfig(rank=0), *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=config.param_dtype, rngs=rngs)
        self.layers = Block(config, lora, rngs=rngs)
        self.final_norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=config.param_dtype)
        if not config.tie_embeddings:
            sizes, dtype = (config.hidden_size, config.vocab_size), config.param_dtype
            self.lm_head = Linear(*sizes, axes=("embed", "vocab"), kernel_dtype=dtype, rngs=rngs)

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return constrain(self.embed(tokens).astype(self.config.compute_dtype), "batch", None, None)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        *,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm. `positions` count from 0 in every segment; segment 0 is padding.
        `dropout_key` turns the adapters' dropout on."""
        return self._run(x, positions, segment_ids, dropout_key=dropout_key)[0]

    def prefill(
        self, x: Float[Array, "B T D"], lengths: Int[Array, " B"], cache_size: int
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Hidden states of the first `lengths[b]` tokens of every row, and a cache of `cache_size` >= T slots that
        holds them. The hidden states of the padding behind them mean nothing."""
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
        hidden, k, v = self._run(x, positions, segment_ids, keep_kv=True)
        room = lambda y: jnp.pad(y, ((0, 0), (0, 0), (0, cache_size - x.shape[1]), (0, 0), (0, 0)))
        return hidden, KVCache(room(k), room(v), lengths)

    def extend(self, x: Float[Array, "B T D"], cache: KVCache) -> tuple[Float[Array, "B T D"], KVCache]:
        """Hidden states of T further tokens of every row, and the cache with them. The caller keeps `cache.length + T`
        within the cache's slots."""
        batch, length, _ = x.shape
        positions = cache.length[:, None] + jnp.arange(length)
        seen = jnp.broadcast_to(cache.length[:, None], (batch, length))
        visible = jnp.broadcast_to(jnp.tri(length, dtype=bool), (batch, length, length))
        hidden, k, v = self._run(x, positions, cache=cache, seen=seen, visible=visible)
        return hidden, cache.append(k, v)

    def branch(
        self,
        x: Float[Array, "B T D"],
        cache: KVCache,
        positions: Int[Array, "B T"],
        seen: Int[Array, "B T"],
        visible: Bool[Array, "B T T"],
    ) -> Float[Array, "B T D"]:
        """Hidden states of T tokens that continue the cached ones as a tree, at `positions` of their own.

        A token sees the first `seen` cached ones of its row, or of the one row that all continue, and among the new
        ones those that `visible` names, itself included.
        """
        return self._run(x, positions, cache=cache, seen=seen, visible=visible)[0]

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 logits of the next token."""
        return _logits(hidden, self._head())

    def _head(self) -> Float[Array, "D V"]:
        return self.embed.embedding[...].T if self.config.tie_embeddings else self.lm_head.kernel[...]

    def token_nll(
        self,
        hidden: Float[Array, "B T D"],
        targets: Int[Array, "B T"],
        where: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T"]:
        """Negative log-likelihood of `targets[b, t]` after position t, float32.

        Logits exist for `loss_chunk` tokens of each row at a time, in the forward and in the backward pass, and only
        for as many chunks as the positions that `where` selects fill; the result is 0 at the others.
        """
        if where is not None:  # sorts the asked positions to the front, and the result back
            order = jnp.argsort(~where, axis=1, stable=True)
            hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
            targets, where = (jnp.take_along_axis(x, order, axis=1) for x in (targets, where))
            nll = self._nll_of_chunks(hidden, targets, where)
            return jnp.take_along_axis(nll, jnp.argsort(order, axis=1), axis=1)
        return self._nll_of_chunks(hidden, targets, None)

    def _nll_of_chunks(self, hidden, targets, where):
        batch, length, _ = hidden.shape
        chunk = min(self.config.loss_chunk, length)
        pad = -length % chunk
        head = constrain(self._head().astype(hidden.dtype), None, "vocab")  # gathered once, not for every chunk

        def chunks(x):
            x = jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)))
            return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

        def of_chunk(hidden, targets):
            logits = constrain(_logits(hidden, head), "batch", None, "vocab")
            picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            return jax.nn.logsumexp(logits, axis=-1) - picked

        def of_asked(hidden, targets, where):
            zeros = lambda hidden, targets: jnp.zeros(targets.shape, jnp.float32)
            return jnp.where(where, jax.lax.cond(where.any(), of_chunk, zeros, hidden, targets), 0)

        # Recomputed around the condition, not in it: else every chunk would keep the head for the backward pass.
        of_one, inputs = (of_chunk, (hidden, targets)) if where is None else (of_asked, (hidden, targets, where))
        of_one = jax.checkpoint(of_one)
        nll = jax.lax.map(lambda args: of_one(*args), tuple(map(chunks, inputs)))
        return jnp.moveaxis(nll, 0, 1).reshape(batch, -1)[:, :length]

    def _run(
        self, x, positions, segment_ids=None, *, cache=None, seen=None, visible=None, dropout_key=None, keep_kv=False
    ):
        """All blocks: (hidden, new keys and values [L, B, T, K, H] or None). The cache is only read."""
        cfg = self.config
        x = constrain(x.astype(cfg.compute_dtype), "batch", None, None)
        cos_sin = cos_and_sin(rotary_angles(positions, cfg.head_dim, cfg.rope_theta))
        graphdef, stacked = nnx.split(self.layers)
        keys = None if dropout_key is None else jax.random.split(dropout_key, cfg.num_layers)
        keep_kv = keep_kv or cache is not None

        def block(x, inputs):
            params, key, cached = inputs
            cached = None if cached is None else LayerCache(*cached, seen, visible)
            x, k, v = nnx.merge(graphdef, params, copy=True)(x, cos_sin, segment_ids, key, cached)
            return x, (k, v) if keep_kv else None

        if cfg.remat != "none":
            block = jax.checkpoint(block, policy=REMAT_POLICIES[cfg.remat], prevent_cse=not cfg.scan_layers)
        inputs = (stacked, keys, None if cache is None else (cache.k, cache.v))
        if cfg.scan_layers:
            x, kv = jax.lax.scan(block, x, inputs)
        else:
            kept = []
            for layer in range(cfg.num_layers):
                x, kv = block(x, jax.tree.map(lambda a: a[layer], inputs))  # noqa: B023
                kept.append(kv)
            kv = jax.tree.map(lambda *layers: jnp.stack(layers), *kept)
        k, v = kv if keep_kv else (None, None)
        return self.final_norm(x), k, v
