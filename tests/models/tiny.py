"""A tiny model, its inputs, and how its outputs are compared."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx

from emollama_jax.models.layers import as_kernel
from emollama_jax.models.llama import Llama, LlamaConfig
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.sharding import abstract
from emollama_jax.weights.engine import Table, param_values, set_params

NO_ADAPTERS = LoRAConfig(rank=0)


def tiny_config(**changes) -> LlamaConfig:
    """Sizes that are all different, so that no two axes can be mixed up unnoticed; float32 throughout."""
    dtypes = dict.fromkeys(("kernel_dtype", "param_dtype", "compute_dtype"), "float32")
    sizes = {
        "vocab_size": 97,
        "hidden_size": 24,
        "intermediate_size": 44,
        "num_layers": 2,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 10,
    }
    return LlamaConfig(**{**sizes, **dtypes, "remat": "none", "loss_chunk": 5, **changes})


def random_llama(config: LlamaConfig, lora: LoRAConfig = NO_ADAPTERS, seed: int = 0) -> Llama:
    """A model whose every parameter matters: attention far from uniform, norms far from 1, adapters far from 0.

    The same numbers whatever they are stored as.
    """
    graphdef, state = abstract(lambda: Llama(config, lora, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(seed)
    for (*_, name), variable in nnx.to_flat_state(state):
        like = variable.get_value()
        noise = random.normal(size=like.shape).astype(np.float32)
        if name == "scale":
            noise = 1 + 0.3 * noise
        elif name != "embedding":
            noise = noise * like.shape[-2] ** -0.5
        if isinstance(like, qwix.QArray):
            variable.set_value(jax.vmap(lambda w, dtype=like.qtype: as_kernel(w, dtype))(noise))
        else:
            variable.set_value(jnp.asarray(noise, like.dtype))
    return nnx.merge(graphdef, state)


@functools.cache
def _compiled(make: Callable[..., nnx.Module], settings: tuple, options: tuple, seed: int) -> Callable[[], nnx.Module]:
    return nnx.jit(lambda: make(*settings, **dict(options), rngs=nnx.Rngs(seed)))


def initialised(make: Callable[..., nnx.Module], *settings, seed: int = 0, **options) -> nnx.Module:
    """A new model, made by one program that equal settings share: parameter by parameter it takes seconds."""
    return _compiled(make, settings, tuple(options.items()), seed)()


def rows(config: LlamaConfig, lengths: tuple[int, ...] = (13, 13), seed: int = 1):
    """Random tokens padded at the right to the longest: tokens, positions, segment ids [B, T]."""
    width = max(lengths)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (len(lengths), width))
    positions = np.broadcast_to(np.arange(width), tokens.shape)
    segment_ids = (positions < np.array(lengths)[:, None]).astype(np.int32)
    return jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segment_ids)


def llama_of(tensors: Mapping[str, np.ndarray], config: LlamaConfig, lora: LoRAConfig, *tables: Table) -> Llama:
    """Our model with the parameters that other implementations name as the tables say."""
    model = random_llama(config, lora)
    values = {}
    for rule in (rule for table in tables for rule in table.rules):
        layers = range(config.num_layers) if "{layer}" in rule.tensor else (None,)
        found = [rule.transform.into(tensors[rule.tensor.format(layer=layer)]) for layer in layers]
        values[rule.param] = jnp.asarray(found[0] if layers == (None,) else np.stack(found))
    state = nnx.state(model)
    assert set(values) == set(param_values(state))
    set_params(state, values)
    nnx.update(model, state)
    return model


def close(ours, theirs, tolerance: float, what: str) -> None:
    """Equal up to `tolerance`, absolute; the error found is printed."""
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    assert ours.shape == theirs.shape, what
    error = np.max(np.abs(ours - theirs))
    print(f"{what}: max error {error:.2e} of values up to {np.max(np.abs(theirs)):.2f}")
    assert error <= tolerance, what
