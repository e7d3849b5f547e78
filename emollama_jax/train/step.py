"""One training step over packed rows: loss, gradients and update of what is trained, compiled as one program.

    graphdef, frozen, state = init_state(model, optimizer)
    step = make_step(graphdef, optimizer, multimodal_loss)
    state, metrics = step(state, frozen, batch, rng)

Axes: B rows, T tokens, A parts of a batch.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from emollama_jax.models.emotion_llama import TRAINABLE, EmotionLlama, is_trainable
from emollama_jax.models.llama import Llama

# Sharded kernels are gathered whole, beside other computation. XLA's other way, rings of small matrix products that add
# up in the type of the activations, is less exact and, by the compiler's own count for a v5e-16, half again as slow.
TPU_OPTIONS = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
}

Batch = Mapping[str, Array]
# (model, batch, dropout key or None) -> (mean loss of the batch's targets, their number)
Loss = Callable[[Any, Batch, Key[Array, ""] | None], tuple[Float[Array, ""], Int[Array, ""]]]


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """All that a step changes: the parameters that are trained, what the optimiser knows of them, steps done."""

    trainable: nnx.State
    opt_state: optax.OptState
    step: Any  # int32 scalar, or what JAX has in its place as it lowers


def init_state(
    model: nnx.Module, optimizer: optax.GradientTransformation, trainable_parts: tuple[str, ...] = TRAINABLE
) -> tuple[nnx.GraphDef, nnx.State, TrainState]:
    """(graphdef, frozen parameters, state before the first step). The parameters stay the model's own arrays; the
    first step takes over those that are trained, which `trainable_parts` (`Config.trainable`) names."""
    is_trained = functools.partial(is_trainable, parts=trainable_parts)
    graphdef, trainable, frozen = nnx.split(model, is_trained, ...)
    return graphdef, frozen, TrainState(trainable, optimizer.init(trainable), jnp.int32(0))


def text_loss(
    model: Llama, batch: Batch, dropout_key: Key[Array, ""] | None
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Mean negative log-likelihood of a packed batch's targets (0 if there are none), and their number.

    The batch holds, each [B, T]: `tokens` int32; `segment_ids` int32, 0 is padding; `positions` int32, from 0 in every
    segment; `loss_mask` bool, true where the next token is a target.
    """
    x = model.embed_tokens(batch["tokens"])
    return _mean_nll(model, model(x, batch["positions"], batch["segment_ids"], dropout_key=dropout_key), batch)


def multimodal_loss(
    model: EmotionLlama, batch: Batch, dropout_key: Key[Array, ""] | None
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """As `text_loss`, of a packed batch of clips (see `models/emotion_llama.py`)."""
    return _mean_nll(model.llama, model(batch, dropout_key=dropout_key), batch)


def _mean_nll(llama: Llama, hidden: Float[Array, "B T D"], batch: Batch) -> tuple[Float[Array, ""], Int[Array, ""]]:
    nll = llama.token_nll(hidden, jnp.roll(batch["tokens"], -1, axis=1), batch["loss_mask"])
    targets = batch["loss_mask"].sum(dtype=jnp.int32)
    return nll.sum() / jnp.maximum(targets, 1), targets


def make_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    *,
    grad_accum_steps: int = 1,
    mesh: Mesh | None = None,
) -> Callable:
    """The compiled `step(state, frozen, batch, rng=None) -> (state, metrics)`.

    The old state's memory is given to the new one. `rng` is one key for the whole run, from which each step derives
    its own dropout; without it there is no dropout. Metrics: `loss`, `grad_norm` and `targets`, scalars on the device.
    A step whose loss or gradient is not finite counts, and changes neither parameters nor what the optimiser knows.

    Args:
        grad_accum_steps: parts A of a batch's rows that are worked through one after another, to save memory; the
            gradient is that of the whole batch, each target of the same weight.
        mesh: where the step runs; for TPUs it is compiled with `TPU_OPTIONS`.
    """

    def gradients(trainable: nnx.State, frozen: nnx.State, batch: Batch, key: Key[Array, ""] | None):
        """(loss, targets, gradients) of the batch or of a part of it."""

        def loss_of(trainable):
            return loss(nnx.merge(graphdef, trainable, frozen), batch, key)

        (value, targets), grads = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        return value, targets, grads

    def accumulated(trainable: nnx.State, frozen: nnx.State, batch: Batch, key: Key[Array, ""] | None):
        # Every A-th row, so that each part's rows lie on all the devices that the batch's lie on.
        parts = jax.tree.map(lambda x: x.reshape(-1, grad_accum_steps, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(sums, part):
            rows, number = part
            value, targets, grads = gradients(
                trainable, frozen, rows, None if key is None else jax.random.fold_in(key, number)
            )
            # A part's mean, by its number of targets, is its sum.
            weighed = jax.tree.map(lambda x: targets * x, (value, grads))
            return jax.tree.map(jnp.add, sums, (*weighed, targets)), None

        zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable), jnp.int32(0))
        (value, grads, targets), _ = jax.lax.scan(add, zeros, (parts, jnp.arange(grad_accum_steps)))
        value, grads = jax.tree.map(lambda x: x / jnp.maximum(targets, 1), (value, grads))
        return value, targets, grads

    options = TPU_OPTIONS if mesh is not None and mesh.devices.flat[0].platform == "tpu" else None

    @functools.partial(jax.jit, donate_argnames="state", compiler_options=options)
    def step(
        state: TrainState, frozen: nnx.State, batch: Batch, rng: Key[Array, ""] | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        key = None if rng is None else jax.random.fold_in(rng, state.step)
        compute = gradients if grad_accum_steps == 1 else accumulated
        value, targets, grads = compute(state.trainable, frozen, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        new, old = (optax.apply_updates(state.trainable, updates), opt_state), (state.trainable, state.opt_state)
        trainable, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        metrics = {"loss": value, "grad_norm": norm, "targets": targets}
        return TrainState(trainable, opt_state, state.step + 1), metrics

    return step
