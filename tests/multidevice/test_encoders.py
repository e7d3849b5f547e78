"""The encoders on a mesh of eight devices are the encoders on one."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from emollama_jax.bench.encode import random_inputs
from emollama_jax.config import DEFAULT_SHARDING, load_config
from emollama_jax.sharding import init_sharded, make_mesh, use_mesh
from emollama_jax.weights.encoders import ENCODERS
from tests.models.tiny import close, initialised


@pytest.mark.parametrize(
    "name", [name if name == "mae" else pytest.param(name, marks=pytest.mark.slow) for name in ENCODERS]
)
def test_on_a_mesh_as_on_one_device(name):
    config = getattr(load_config("tiny"), name)
    make_model = lambda: ENCODERS[name](config, rngs=nnx.Rngs(0))
    inputs = [jnp.asarray(x) for x in random_inputs(config, 4, 1, seed=0)]
    alone = jax.jit(initialised(ENCODERS[name], config).encode)(*inputs)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with use_mesh(mesh, DEFAULT_SHARDING):
        model = init_sharded(make_model, mesh, DEFAULT_SHARDING)
        kernel = model.layers.attn.q_proj.kernel[...]
        assert kernel.sharding.shard_shape(kernel.shape)[1:] == (config.hidden_size // 2, config.hidden_size // 2)
        graphdef, state = nnx.split(model)
        spread = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state).encode(*inputs))(state, *inputs)
    close(spread, alone, 1e-5, name)
