"""The model on every mesh of eight devices is the model on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from emollama_jax.config import DEFAULT_SHARDING
from emollama_jax.models.llama import Llama
from emollama_jax.models.lora import LoRAConfig, adapters, is_adapter
from emollama_jax.sharding import abstract, init_sharded, make_mesh, use_mesh
from emollama_jax.weights.engine import param_values
from tests.models.tiny import close, tiny_config

MESHES = [(d, f, 8 // d // f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if 8 % (d * f) == 0]
LORA = LoRAConfig(rank=4, alpha=4.0, dropout=0.0, targets=("q_proj", "down_proj"))
BATCH, LENGTH, D, F, V, N, H, L = 8, 10, 64, 128, 96, 8, 8, 2


def make_model(kernel_dtype: str, kv_heads: int) -> Llama:
    """A new model with everything six times as large, so that attention is far from uniform, and B far from zero."""
    config = tiny_config(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_layers=L,
        num_heads=N,
        num_kv_heads=kv_heads,
        head_dim=H,
        kernel_dtype=kernel_dtype,
        remat="full",
    )
    model = Llama(config, LORA, rngs=nnx.Rngs(0))
    larger = lambda x: 6 * x if jnp.issubdtype(x.dtype, jnp.floating) else x
    nnx.update(model, jax.tree.map(larger, nnx.state(model, lambda path, _: path[-1] in ("kernel", "embedding"))))
    for _, layer in adapters(model):
        layer.lora_b[...] = (jnp.arange(layer.lora_b.size) * 37 % 11 - 5).reshape(layer.lora_b.shape) / 20
    return model


def batch() -> dict[str, np.ndarray]:
    """Rows of two segments and some padding."""
    random = np.random.default_rng(0)
    column = np.arange(LENGTH)
    cut, end = random.integers(2, 5, (BATCH, 1)), random.integers(6, LENGTH + 1, (BATCH, 1))
    return {
        "tokens": random.integers(0, V, (BATCH, LENGTH)),
        "positions": np.where(column < cut, column, column - cut),
        "segment_ids": np.where(column < cut, 1, 2) * (column < end),
    }


def outputs(model: Llama, arrays: dict[str, jax.Array]):
    """Logits, and the gradients of the adapters, of a training step's loss."""
    graphdef, trained, frozen = nnx.split(model, is_adapter, ...)

    @jax.jit
    def step(trained, frozen, tokens, positions, segment_ids):
        def loss(trained):
            model = nnx.merge(graphdef, trained, frozen)
            hidden = model(model.embed_tokens(tokens), positions, segment_ids)
            nll = model.token_nll(hidden, jnp.roll(tokens, -1, axis=1))
            return jnp.sum(nll * (segment_ids > 0)), model.logits(hidden)

        return jax.grad(loss, has_aux=True)(trained)

    gradients, logits = step(trained, frozen, **arrays)
    return logits, param_values(gradients)


@functools.cache
def on_one_device(kernel_dtype: str, kv_heads: int):
    """Parameters by path, logits and gradients."""
    make = functools.partial(make_model, kernel_dtype, kv_heads)
    model = nnx.merge(abstract(make)[0], jax.jit(lambda: nnx.state(make()))())
    arrays = {name: jnp.asarray(value) for name, value in batch().items()}
    return param_values(nnx.state(model)), *outputs(model, arrays)


def shard_shapes(fsdp: int, tensor: int, kv_heads: int) -> dict[str, tuple[int, ...]]:
    """What one device must hold of each parameter."""
    d, heads, kv, f, v = D // fsdp, N * H // tensor, kv_heads * H // tensor, F // tensor, V // tensor
    kernels = {
        "attn.q_proj": (d, heads),
        "attn.k_proj": (d, kv),
        "attn.v_proj": (d, kv),
        "attn.o_proj": (heads, d),
        "mlp.gate_proj": (d, f),
        "mlp.up_proj": (d, f),
        "mlp.down_proj": (f, d),
    }
    adapted = {name: shape for name, shape in kernels.items() if name.split(".")[1] in LORA.targets}
    return {
        "embed.embedding": (v, d),
        "lm_head.kernel": (d, v),
        "final_norm.scale": (D,),
        "layers.attn_norm.scale": (L, D),
        "layers.mlp_norm.scale": (L, D),
        **{f"layers.{name}.kernel": (L, *shape) for name, shape in kernels.items()},
        **{f"layers.{name}.lora_a": (L, n_in, LORA.rank) for name, (n_in, _) in adapted.items()},
        **{f"layers.{name}.lora_b": (L, LORA.rank, n_out) for name, (_, n_out) in adapted.items()},
    }


def check(sizes: tuple[int, int, int], kernel_dtype: str, kv_heads: int) -> None:
    data, fsdp, tensor = sizes
    values, logits, gradients = on_one_device(kernel_dtype, kv_heads)
    mesh = make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor})
    model = init_sharded(functools.partial(make_model, kernel_dtype, kv_heads), mesh, DEFAULT_SHARDING)

    found = param_values(nnx.state(model))
    expected_shapes = shard_shapes(fsdp, tensor, kv_heads)
    assert set(found) == set(values) == set(expected_shapes)
    for path, value in found.items():
        numbers = jax.tree.leaves(value)[0]  # of a quantised kernel the numbers, then the scales
        assert numbers.addressable_shards[0].data.shape == expected_shapes[path], path
        for ours, expected in zip(jax.tree.leaves(value), jax.tree.leaves(values[path]), strict=True):
            assert ours.dtype == expected.dtype
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected), err_msg=path)

    by_rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with use_mesh(mesh, DEFAULT_SHARDING):
        arrays = {name: jax.device_put(value, by_rows) for name, value in batch().items()}
        found_logits, found_gradients = outputs(model, arrays)
    # Only the order of sums differs: a few units in the last place of float32, 1.2e-7 of the largest value each.
    close(found_logits, logits, 1e-5, "logits")
    assert set(found_gradients) == set(gradients)
    for path, expected in gradients.items():
        scale = np.max(np.abs(expected))
        assert scale > 1e-3, path
        close(found_gradients[path] / scale, expected / scale, 1e-5, f"gradient of {path}, relative")


QUICK = {(2, 2, 2), (1, 8, 1)}


@pytest.mark.parametrize(
    "sizes",
    [pytest.param(sizes, marks=[] if sizes in QUICK else pytest.mark.slow) for sizes in MESHES],
    ids=lambda sizes: "x".join(map(str, sizes)),
)
def test_every_mesh_in_float32(sizes):
    """Two key/value heads: fewer than the devices of some tensor axes."""
    check(sizes, "float32", kv_heads=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "kernel_dtype", "kv_heads"),
    [
        ((2, 2, 2), "float32", 8),
        ((2, 2, 2), "int8", 2),
        ((1, 8, 1), "int8", 2),
        ((1, 1, 8), "nf4", 8),
        ((1, 4, 2), "nf4", 8),
    ],
    ids=str,
)
def test_more_heads_and_quantised_kernels(sizes, kernel_dtype, kv_heads):
    check(sizes, kernel_dtype, kv_heads)


def test_all_meshes_of_eight_devices_are_there():
    assert len(set(MESHES)) == 10 and all(np.prod(sizes) == 8 for sizes in MESHES)


@pytest.mark.smoke
def test_nothing_frozen_has_optimiser_state():
    """Adam keeps two numbers for each adapter's, and none for anything else."""
    model = make_model("int8", 2)
    graphdef, trained, frozen = nnx.split(model, is_adapter, ...)
    names = {f"layers.{name}.lora_{letter}" for name in ("attn.q_proj", "mlp.down_proj") for letter in "ab"}
    assert set(param_values(trained)) == names
    assert set(param_values(trained)) | set(param_values(frozen)) == set(shard_shapes(1, 1, 2))
    adam = optax.adamw(1e-3).init(trained)[0]
    for moment in (adam.mu, adam.nu):
        assert {name: value.shape for name, value in param_values(moment).items()} == {
            name: value.shape for name, value in param_values(trained).items()
        }
