"""One training step over packed rows: loss, gradients and update of what is trained, compiled as one program.

    graphdef, frozen, state = init_state(model, optimizer)
    step = make_step(graphdef, optimizer, multimodal_loss)
    state, metrics = step(state, frozen, batch, rng)

Axes: B rows, T tokens, A parts of a batch.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from emollama_jax.data.batch import Batch
from emollama_jax.models.emotion_llama import TRAINABLE, EmotionLlama, is_trainable
from emollama_jax.models.llama import Llama

# Sharded kernels are gathered whole, beside other computation. XLA's other way, rings of small matrix products that add
# up in the type of the activations, is less exact and, by the compiler's own count for a v5e-16, half again as slow.
TPU_OPTIONS = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    # Fast memory that one operation may use: by the count for v5e, v5p and v6e, large products take less with 48 MiB.
    "xla_tpu_scoped_vmem_limit_kib": 49152,
}

# (model, batch, dropout key or None) -> (weighted mean loss of the batch's targets, sum of their weights)
Loss = Callable[[Any, Batch, Key[Array, ""] | None], tuple[Float[Array, ""], Float[Array, ""]]]


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
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute the loss of packed rows of text, and the sum of `loss_weights`.

    The loss is the sum of `loss_weights` times the targets' negative log-likelihoods, divided by the sum of
    `loss_weights`; 0 without targets.
    """
    hidden = model(model.embed_tokens(batch.tokens), batch.positions, batch.segment_ids, dropout_key=dropout_key)
    return _weighted_nll(model, hidden, batch)


def multimodal_loss(
    model: EmotionLlama, batch: Batch, dropout_key: Key[Array, ""] | None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute the loss of packed rows of clips, and the sum of `loss_weights`, as `text_loss`."""
    images = {"frames": batch.frames, "image_tokens": batch.image_tokens, "has_image": batch.has_image}
    soft = model.soft_tokens(batch.features, **images)
    hidden = model(batch.tokens, soft, batch.soft_index, batch.positions, batch.segment_ids, dropout_key=dropout_key)
    return _weighted_nll(model.llama, hidden, batch)


def _weighted_nll(
    llama: Llama, hidden: Float[Array, "B T D"], batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    weights = batch.loss_weights
    nll = llama.token_nll(hidden, jnp.roll(batch.tokens, -1, axis=1), weights > 0)
    total = weights.sum()
    return (weights * nll).sum() / jnp.where(total > 0, total, 1), total


def make_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    *,
    grad_accum_steps: int = 1,
    loss_scale: float = 1.0,
    mesh: Mesh | None = None,
) -> Callable:
    """Make the compiled `step(state, frozen, batch, rng=None) -> (state, metrics)`.

    The old state's memory is given to the new one. `rng` is one key for the whole run, from which each step derives
    its own dropout; without it there is no dropout. Metrics, scalars on the device: `loss`, `grad_norm` and `targets`,
    the number of target tokens. A step whose loss or gradient is not finite counts, and changes neither parameters nor
    the optimiser's state.

    Args:
        grad_accum_steps: parts A of a batch's rows that are worked through one after another, to save memory; the
            gradient is that of the whole batch: each part counts by the sum of its `loss_weights`.
        loss_scale: what the loss is multiplied by before, and its gradients divided by after backpropagation, so that
            these are not rounded to 0 in float16. Neither the loss nor the gradients that are reported have it.
        mesh: where the step runs; for TPUs it is compiled with `TPU_OPTIONS`.
    """

    def gradients(trainable: nnx.State, frozen: nnx.State, batch: Batch, key: Key[Array, ""] | None):
        """Compute (loss, sum of weights, gradients) of the batch or of a part of it."""

        def loss_of(trainable):
            value, weight = loss(nnx.merge(graphdef, trainable, frozen), batch, key)
            return value * loss_scale, weight

        (value, weight), grads = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        value, grads = jax.tree.map(lambda x: x / loss_scale, (value, grads))
        return value, weight, grads

    def accumulated(trainable: nnx.State, frozen: nnx.State, batch: Batch, key: Key[Array, ""] | None):
        # Every A-th row, so that each part's rows lie on all the devices that the batch's lie on.
        parts = jax.tree.map(lambda x: x.reshape(-1, grad_accum_steps, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(sums, part):
            rows, number = part
            value, weight, grads = gradients(
                trainable, frozen, rows, None if key is None else jax.random.fold_in(key, number)
            )
            # A part's mean times the sum of its weights is its sum.
            weighed = jax.tree.map(lambda x: weight * x, (value, grads))
            return jax.tree.map(jnp.add, sums, (*weighed, weight)), None

        zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable), jnp.float32(0))
        (value, grads, weight), _ = jax.lax.scan(add, zeros, (parts, jnp.arange(grad_accum_steps)))
        value, grads = jax.tree.map(lambda x: x / jnp.where(weight > 0, weight, 1), (value, grads))
        return value, weight, grads

    options = TPU_OPTIONS if mesh is not None and mesh.devices.flat[0].platform == "tpu" else None

    @functools.partial(jax.jit, donate_argnames="state", compiler_options=options)
    def step(
        state: TrainState, frozen: nnx.State, batch: Batch, rng: Key[Array, ""] | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        key = None if rng is None else jax.random.fold_in(rng, state.step)
        compute = gradients if grad_accum_steps == 1 else accumulated
        value, _, grads = compute(state.trainable, frozen, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        new, old = (optax.apply_updates(state.trainable, updates), opt_state), (state.trainable, state.opt_state)
        trainable, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        targets = (batch.loss_weights > 0).sum(dtype=jnp.int32)
        metrics = {"loss": value, "grad_norm": norm, "targets": targets}
        return TrainState(trainable, opt_state, state.step + 1), metrics

    return step
