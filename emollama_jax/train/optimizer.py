"""The recipe: AdamW with weight decay on matrices, a linear warm-up and a cosine, both by the step."""

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
    """AdamW, after clipping where it is asked for."""

    def decays(params):
        name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        return jax.tree_util.tree_map_with_path(lambda path, _: name(path).rpartition(".")[2] not in VECTORS, params)

    adamw = optax.adamw(
        lambda count: learning_rate(config, count),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decays,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw
