"""One training step over packed rows: loss, gradients and update of what is trained, compiled as one program.

    graphdef, frozen, state = init_state(model, optimizer)
    step = make_step(graphdef, optimizer, clip_loss)
    state, metrics = step(state, frozen, batch, rng)

Axes: B rows, T tokens.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from emollama_jax.models.emotion_llama import TRAINABLE, EmotionLlama, is_trainable
from emollama_jax.models.llama import Llama

Batch = Mapping[str, Array]
# (model, batch, dropout key or None) -> (mean loss of the batch's targets, their number)
Loss = Callable[[Any, Batch, Key[Array, ""] | None], tuple[Float[Array, ""], Int[Array, ""]]]


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """All that a step changes: the parameters that are trained, what the optimiser knows of them, steps done."""

    trainable: nnx.State
    opt_state: optax.OptState
    step: Int[Array, ""]


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


def clip_loss(
    model: EmotionLlama, batch: Batch, dropout_key: Key[Array, ""] | None
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """As `text_loss`, of a packed batch of clips (see `models/emotion_llama.py`)."""
    return _mean_nll(model.llama, model(batch, dropout_key=dropout_key), batch)


def _mean_nll(llama: Llama, hidden: Float[Array, "B T D"], batch: Batch) -> tuple[Float[Array, ""], Int[Array, ""]]:
    nll = llama.token_nll(hidden, jnp.roll(batch["tokens"], -1, axis=1))
    targets = batch["loss_mask"].sum(dtype=jnp.int32)
    return jnp.where(batch["loss_mask"], nll, 0).sum() / jnp.maximum(targets, 1), targets


def make_step(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, loss: Loss) -> Callable:
    """The compiled `step(state, frozen, batch, rng=None) -> (state, metrics)`.

    The old state's memory is given to the new one. `rng` is one key for the whole run, from which each step derives
    its own dropout; without it there is no dropout. Metrics: `loss`, `grad_norm` and `targets`, scalars on the device.
    """

    @functools.partial(jax.jit, donate_argnames="state")
    def step(
        state: TrainState, frozen: nnx.State, batch: Batch, rng: Key[Array, ""] | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        key = None if rng is None else jax.random.fold_in(rng, state.step)

        def loss_of(trainable):
            return loss(nnx.merge(graphdef, trainable, frozen), batch, key)

        (value, targets), grads = jax.value_and_grad(loss_of, has_aux=True)(state.trainable)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), "targets": targets}
        return TrainState(optax.apply_updates(state.trainable, updates), opt_state, state.step + 1), metrics

    return step
