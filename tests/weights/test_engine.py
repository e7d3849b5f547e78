"""The engine: complete or an error, nothing read before everything is checked, every tensor read once."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emollama_jax.config import DEFAULT_SHARDING
from emollama_jax.models.layers import as_kernel
from emollama_jax.models.llama import Llama
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.sharding import make_mesh
from emollama_jax.weights.engine import Rule, Table, export, load
from emollama_jax.weights.llama import hugging_face_table
from tests.weights.tiny import (
    CountingSource,
    assert_bit_equal,
    assert_holds,
    random_weights,
    stored_values,
    tiny_config,
    user_error,
)

LORA = LoRAConfig(rank=4)
Q, K, V, DOWN = (
    f"model.layers.1.{n}.weight" for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
)


def read(weights, config=None, *, lora=LoRAConfig(rank=0), seed=0, table=None, **places):
    """(the model, the report, the source)."""
    config = config or tiny_config()
    source = CountingSource(weights)
    table = table or hugging_face_table(config)
    return *load(lambda: Llama(config, lora, rngs=nnx.Rngs(seed)), source, table, **places), source


@pytest.fixture(scope="module")
def weights():
    return random_weights(tiny_config())


@pytest.fixture(scope="module")
def plain(weights):
    """The model on one device, by the storage of its kernels; tests only look at it."""
    return {dtype: read(weights, tiny_config(kernel_dtype=dtype))[0] for dtype in ("float32", "int8", "nf4")}


# --- complete, or an error ---


@pytest.mark.parametrize("num_layers", [1, 3])
def test_every_tensor_is_read_once_and_in_its_place(num_layers):
    config = tiny_config(num_layers=num_layers)
    weights = random_weights(config)
    model, report, source = read(weights, config)
    assert sorted(source.reads) == sorted(weights)
    assert sorted(report.read) == sorted(weights)
    assert (report.dropped, report.initialised) == ((), ())
    assert_holds(model, weights)


def test_a_layer_count_equal_to_the_width_is_no_trap():
    """A stacked parameter of one layer, or of as many as the vector is long, is still taken layer by layer."""
    config = tiny_config(num_layers=2, hidden_size=2, head_dim=2, num_heads=2, num_kv_heads=1, intermediate_size=2)
    weights = random_weights(config)
    assert_holds(read(weights, config)[0], weights)


def test_all_that_does_not_fit_is_one_error_and_nothing_is_read(weights):
    wrong = dict(weights)
    del wrong[Q]
    wrong["model.layers.3.mlp.up_proj.weight"] = weights[DOWN]
    wrong[K] = weights[K].T
    wrong["model.layers.1.self_attn.v_projection.weight"] = wrong.pop(V)
    source = CountingSource(wrong)
    misnamed = "model.layers.1.self_attn.v_projection.weight (for model.layers.1.self_attn.v_proj.weight?)"
    with user_error(
        "memory.safetensors",
        f"2 missing: {Q}, {V}; 2 unknown: ",
        misnamed,
        "model.layers.3.mlp.up_proj.weight",
        f"1 of the wrong shape: {K} is [64, 48], not [48, 64]; check",
    ):
        load(lambda: Llama(tiny_config(), rngs=nnx.Rngs(0)), source, hugging_face_table(tiny_config()))
    assert source.reads == []


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "name"])
def test_each_alone_is_an_error_too(weights, change):
    wrong = dict(weights)
    match change:
        case "missing":
            del wrong[Q]
        case "extra":
            wrong["x"] = weights[Q]
        case "shape":
            wrong[Q] = weights[Q][:, :-1]
        case _:
            wrong["q"] = wrong.pop(Q)
    with user_error({"extra": "1 unknown: x;", "shape": f"{Q} is [96, 63], not [96, 64];"}.get(change, Q)):
        read(wrong)


def test_the_axes_of_a_matrix_are_not_confused():
    """A transposed tensor is the wrong shape, also where a reshape would make it fit."""
    config = tiny_config()
    wrong = random_weights(config)
    wrong[DOWN] = np.ascontiguousarray(wrong[DOWN].T)
    with user_error(f"{DOWN} is [128, 64], not [64, 128]"):
        read(wrong, config)
    wrong[DOWN] = wrong[DOWN].reshape(1, 64, 128)
    with user_error(f"{DOWN} is [1, 64, 128], not [64, 128]"):
        read(wrong, config)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [DOWN, "model.norm.weight"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_number_that_is_none(weights, name, number, dtype):
    wrong = dict(weights)
    wrong[name] = wrong[name].astype(jnp.dtype(dtype))
    wrong[name].flat[-1] = number
    with user_error(f"tensor {name} holds NaN or infinity: memory.safetensors"):
        read(wrong)


def test_dropped_tensors_are_reported_and_not_read(weights):
    more = weights | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.full(12, np.nan, "f4") for i in range(3)}
    model, report, source = read(more)
    assert report.dropped == tuple(sorted(set(more) - set(weights)))
    assert sorted(source.reads) == sorted(weights)
    assert_holds(model, weights)


def test_adapters_start_as_a_new_models():
    config = tiny_config(num_layers=2)
    weights = random_weights(config)
    model, report, _ = read(weights, config, lora=LORA, seed=3)
    assert_holds(model, weights)
    adapters = {f"layers.attn.{name}_proj.lora_{letter}" for name in "qv" for letter in "ab"}
    assert set(report.initialised) == adapters
    loaded, new = stored_values(model), stored_values(Llama(config, LORA, rngs=nnx.Rngs(3)))
    assert_bit_equal({path: loaded[path] for path in adapters}, {path: new[path] for path in adapters})
    assert np.std(new["layers.attn.q_proj.lora_a"]) > 0.01


class Net(nnx.Module):
    """A stack of vectors that may start as they are, and a scale that may not."""

    def __init__(self):
        self.bias = nnx.Param(jnp.ones((2, 3)))
        self.scale = nnx.Param(jnp.ones(3))


NET = Table((Rule("b.{layer}", "bias"), Rule("s", "scale")), init=("bias",))


def test_what_may_be_absent_is_absent_as_a_whole():
    full = {name: np.arange(3, dtype=np.float32) + i for i, name in enumerate(("b.0", "b.1", "s"))}
    model, report = load(Net, CountingSource(full), NET)
    np.testing.assert_array_equal(model.bias[...], [full["b.0"], full["b.1"]])
    assert report.initialised == ()

    model, report = load(Net, CountingSource({"s": full["s"]}), NET)
    np.testing.assert_array_equal(model.bias[...], np.ones((2, 3)))
    np.testing.assert_array_equal(model.scale[...], full["s"])
    assert (report.read, report.initialised) == (("s",), ("bias",))

    with user_error("1 missing: b.1;"):
        load(Net, CountingSource({"s": full["s"], "b.0": full["b.0"]}), NET)
    with user_error("1 missing: s;"):
        load(Net, CountingSource({"b.0": full["b.0"], "b.1": full["b.1"]}), NET)


def test_a_parameter_without_rule_is_a_defect_of_the_table():
    with pytest.raises(ValueError, match="no rule for the parameter scale"):
        load(Net, CountingSource({}), Table(NET.rules[:1], init=NET.init))


# --- storage ---


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_casts(stored, wanted):
    config = tiny_config(num_layers=1, param_dtype=wanted, kernel_dtype=wanted)
    weights = {name: value.astype(jnp.dtype(stored)) for name, value in random_weights(config).items()}
    model = read(weights, config)[0]
    for path, value in stored_values(model).items():
        assert value.dtype == wanted, path
    np.testing.assert_array_equal(model.lm_head.kernel[...], weights["lm_head.weight"].T.astype(jnp.dtype(wanted)))


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_kernels_are_quantised_layer_by_layer(weights, plain, dtype):
    model = plain[dtype]
    for layer in range(3):
        expected = as_kernel(jnp.asarray(weights[f"model.layers.{layer}.mlp.down_proj.weight"].T), dtype)
        found = jax.tree.map(lambda x: x[layer], model.layers.mlp.down_proj.kernel.get_value())  # noqa: B023
        assert found.qtype == dtype
        assert_bit_equal({"down_proj": found}, {"down_proj": expected})
    assert model.lm_head.kernel[...].dtype == "float32"


def test_few_tensors_are_on_the_host_at_once(weights):
    alive, most = [], 0

    class Fresh(CountingSource):
        def read(self, name):
            nonlocal most
            most = max(most, sum(reference() is not None for reference in alive))
            array = super().read(name).copy()
            alive.append(weakref.ref(array))
            return array

    config = tiny_config(kernel_dtype="bfloat16", param_dtype="bfloat16")  # or the CPU backend may keep the arrays
    load(lambda: Llama(config, rngs=nnx.Rngs(0)), Fresh(weights), hugging_face_table(config))
    assert len(alive) == len(weights)
    assert most <= 2


# --- meshes ---

SHARDS = {  # of the tiny model on data=2, fsdp=2, tensor=2
    "embed.embedding": (320, 32),
    "layers.attn_norm.scale": (3, 64),
    "layers.attn.q_proj.kernel": (3, 32, 48),
    "layers.attn.k_proj.kernel": (3, 32, 24),
    "layers.attn.v_proj.kernel": (3, 32, 24),
    "layers.attn.o_proj.kernel": (3, 48, 32),
    "layers.attn.q_proj.lora_a": (3, 32, 4),
    "layers.attn.q_proj.lora_b": (3, 4, 48),
    "layers.attn.v_proj.lora_a": (3, 32, 4),
    "layers.attn.v_proj.lora_b": (3, 4, 24),
    "layers.mlp_norm.scale": (3, 64),
    "layers.mlp.gate_proj.kernel": (3, 32, 64),
    "layers.mlp.up_proj.kernel": (3, 32, 64),
    "layers.mlp.down_proj.kernel": (3, 64, 32),
    "final_norm.scale": (64,),
    "lm_head.kernel": (32, 320),
}


@pytest.fixture
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices()[:8])


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", ["float32", "int8", "nf4"])
def test_sharded_load_is_the_plain_one(weights, plain, mesh, dtype):
    sharded, _, source = read(weights, tiny_config(kernel_dtype=dtype), mesh=mesh, rules=DEFAULT_SHARDING)
    assert sorted(source.reads) == sorted(weights)
    assert_bit_equal(stored_values(sharded), stored_values(plain[dtype]))
    for value in jax.tree.leaves(stored_values(plain[dtype])):
        assert len(value.sharding.device_set) == 1
    for path, value in stored_values(sharded).items():
        numbers, *scales = jax.tree.leaves(value)
        assert numbers.sharding.shard_shape(numbers.shape) == SHARDS[path], path
        for leaf in (numbers, *scales):
            assert len(leaf.sharding.device_set) == 8, path
            assert all(shard.data.shape == leaf.sharding.shard_shape(leaf.shape) for shard in leaf.addressable_shards)
        for scale in scales:  # one an output channel: they go where their channels go
            assert scale.sharding.shard_shape(scale.shape)[2] == SHARDS[path][2], path


def test_new_adapters_on_a_mesh_are_those_of_one_device(mesh):
    config = tiny_config(num_layers=1)
    weights = random_weights(config)
    places = {"mesh": mesh, "rules": DEFAULT_SHARDING}
    sharded, plain = (stored_values(read(weights, config, lora=LORA, **where)[0]) for where in (places, {}))
    assert_bit_equal(sharded, plain)
    for path in (path for path in sharded if "lora" in path):
        assert sharded[path].sharding.shard_shape(sharded[path].shape)[1:] == SHARDS[path][1:]


# --- out ---


@pytest.mark.parametrize("tied", [False, True])
def test_export_gives_back_names_and_numbers(tied):
    config = tiny_config(tie_embeddings=tied)
    weights = random_weights(config)
    model = read(weights, config, lora=LORA)[0]
    exported = list(export(model, hugging_face_table(config)))
    assert len(exported) == len(weights)
    assert_bit_equal(dict(exported), weights)
    assert all(value.flags.c_contiguous for _, value in exported)


@pytest.mark.parametrize("dtype", ["float32", "int8", "nf4"])
def test_export_dtypes(plain, dtype):
    """Its own dtype for each parameter, bfloat16 for what is quantised; or one for all."""
    table = hugging_face_table(tiny_config())
    exported = dict(export(plain[dtype], table))
    assert exported[Q].dtype == ("float32" if dtype == "float32" else "bfloat16")
    assert exported["model.norm.weight"].dtype == "float32"
    assert {value.dtype.name for _, value in export(plain[dtype], table, dtype="float16")} == {"float16"}


@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.5 / 127), ("nf4", 0.16)])
def test_export_of_quantised_kernels_is_near_the_original(weights, plain, dtype, bound):
    """Within half a step: 1/127 of the largest number of a column for int8, the widest gap of normal floats for nf4."""
    for name, value in export(plain[dtype], hugging_face_table(tiny_config()), dtype="float32"):
        original = weights[name]
        if value.ndim == 1 or name in ("lm_head.weight", "model.embed_tokens.weight"):
            np.testing.assert_array_equal(value, original)
        else:
            largest = np.abs(original).max(axis=1, keepdims=True)
            error = np.max(np.abs(value - original) / largest)
            assert 0 < error <= bound * 1.001, name
