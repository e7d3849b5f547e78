"""What the loss over sharded parameters sends."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from emollama_jax.config import DEFAULT_SHARDING
from emollama_jax.models.llama import Llama
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.plan.hlo import read_work
from emollama_jax.sharding import init_sharded, make_mesh, use_mesh
from tests.models.tiny import tiny_config


def gathered(loss_chunk: int, *, tied: bool) -> float:
    """Bytes that a device sends to gather what the loss of 32 tokens and its gradient need."""
    mesh = make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    config = tiny_config(vocab_size=96, hidden_size=64, loss_chunk=loss_chunk, tie_embeddings=tied)
    model = init_sharded(lambda: Llama(config, LoRAConfig(rank=0), rngs=nnx.Rngs(0)), mesh, DEFAULT_SHARDING)
    graphdef, state = nnx.split(model)

    def loss(hidden, state):
        return nnx.merge(graphdef, state).token_nll(hidden, jnp.zeros((8, 32), jnp.int32)).sum()

    with use_mesh(mesh, DEFAULT_SHARDING):
        text = jax.jit(jax.grad(loss)).lower(jnp.ones((8, 32, 64)), state).compile().as_text()
    collectives = read_work(text, [0] * 8).collectives
    return sum(one.bytes * one.times for one in collectives if one.kind == "all-gather")


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_gathered_once_for_all_chunks(tied):
    head = 4 * 96 * 64 * 7 / 8
    few, many = gathered(16, tied=tied), gathered(4, tied=tied)
    assert head <= many <= few + head / 2
