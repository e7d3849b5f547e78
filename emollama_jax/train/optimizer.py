"""The recipe: AdamW with weight decay on matrices, a linear warm-up and a cosine, both by the step.

Axes: I inputs and D outputs of a projector.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from emollama_jax.config import TrainConfig

VECTORS = ("bias", "scale")  # the names of parameters that decay does not touch


def learning_rate(config: TrainConfig, step: int | Array):
    """The rate of the step after `step` others: up from `warmup_from` in a line, then on the half cosine that would
    have begun at step 0 and ends at `steps`, as the reference has it. Of an int it is computed on the host."""
    xp = np
    if isinstance(step, jax.Array):
        xp, step = jnp, step.astype(jnp.float32)  # exact below 2**24 steps, and float32 whatever JAX's default
    up = config.warmup_from + (config.learning_rate - config.warmup_from) * step / max(config.warmup_steps, 1)
    turn = np.pi * xp.minimum(step, config.steps) / config.steps
    down = config.final_rate + (config.learning_rate - config.final_rate) * 0.5 * (1 + xp.cos(turn))
    return xp.where(step < config.warmup_steps, up, down)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW, after clipping where it is asked for, on centred projectors where that is asked for."""

    def decays(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: _name(path).rpartition(".")[2] not in VECTORS, params)

    adamw = optax.adamw(
        lambda count: learning_rate(config, count),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decays,
    )
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw
    return center_projectors(optimizer) if config.center_projectors else optimizer


class CenteredState(NamedTuple):
    """State of `center_projectors`."""

    means: Mapping[str, jax.Array]
    """Mean of a projector's inputs, float32 [I], by the projector's name; 0 until they are set."""
    inner: optax.OptState


def center_projectors(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Optimises each projector x W + b as (x - m) W + c with the fixed mean m of its inputs, b = c - m W.

    The gradient by W is then dW - m db, and a step of W moves b by its part of -m W. Without this, a step of W moves
    what all clips have in common far more than what tells them apart.
    """

    def init(params):
        flat, _ = _flatten(params)
        means = {name: jnp.zeros(flat[kernel].shape[0], jnp.float32) for name, (kernel, _) in _projectors(flat).items()}
        return CenteredState(means, inner.init(params))

    def update(gradients, state, params=None):
        flat, rebuild = _flatten(gradients)
        for name, (kernel, bias) in _projectors(flat).items():
            flat[kernel] = flat[kernel] - jnp.outer(state.means[name], flat[bias])
        updates, inner_state = inner.update(rebuild(flat), state.inner, params)
        flat, rebuild = _flatten(updates)
        for name, (kernel, bias) in _projectors(flat).items():
            flat[bias] = flat[bias] - jnp.matmul(state.means[name], flat[kernel], precision="highest")
        return rebuild(flat), CenteredState(state.means, inner_state)

    return optax.GradientTransformation(init, update)


def set_means(state: CenteredState, means: Mapping[str, np.ndarray]) -> CenteredState:
    """Sets the means [I] of the projectors that are trained; one without a mean here is not centred."""
    place = lambda name, old: jax.device_put(np.float32(means[name]), old.sharding) if name in means else old
    return state._replace(means={name: place(name, old) for name, old in state.means.items()})


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def _flatten(tree: Any) -> tuple[dict[str, jax.Array], Any]:
    """(leaves by name, a function from such leaves back to the tree)."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    flat = {_name(path): leaf for path, leaf in leaves}
    return flat, lambda flat: jax.tree_util.tree_unflatten(treedef, flat.values())


def _projectors(names: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The names of kernel and bias of each projector, by the projector's name."""
    kernels = [name for name in names if name.startswith("projectors.") and name.endswith(".kernel")]
    return {name.split(".")[1]: (name, f"{name.removesuffix('kernel')}bias") for name in kernels}
