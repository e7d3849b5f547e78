"""Meshes, and the rules that place logical axes on them."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from jax.sharding import PartitionSpec

from emollama_jax.config import DEFAULT_SHARDING, load_config
from emollama_jax.errors import UserError
from emollama_jax.models.layers import Linear
from emollama_jax.models.llama import Llama
from emollama_jax.sharding import abstract, constrain, init_sharded, make_mesh, partition_spec, shardings, use_mesh

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "heads"), (8, 8), PartitionSpec("fsdp", "tensor")),
        (("layers", "embed", "mlp"), (3, 8, 8), PartitionSpec(None, "fsdp", "tensor")),
        (("batch", "seq"), (4, 7), PartitionSpec(("data", "fsdp"), None)),
        ((None, "embed"), (8, 8), PartitionSpec(None, "fsdp")),
        # A dimension that the mesh does not divide stays whole: 3 by 2, 6 by 2 * 2, and a shared scale's 1.
        (("embed", "heads"), (3, 8), PartitionSpec(None, "tensor")),
        (("batch", "heads"), (6, 8), PartitionSpec(None, "tensor")),
        (("embed", "heads"), (1, 8), PartitionSpec(None, "tensor")),
        # A mesh axis serves the first dimension that asks for it; also one that a later dimension asks for in part.
        (("heads", "mlp"), (8, 8), PartitionSpec("tensor", None)),
        (("embed", "batch"), (8, 8), PartitionSpec("fsdp", "data")),
        (("batch", "embed"), (8, 8), PartitionSpec(("data", "fsdp"), None)),
        # One that did not fit leaves the axis to the next.
        (("heads", "mlp"), (3, 8), PartitionSpec(None, "tensor")),
        ((), (), PartitionSpec()),
    ],
    ids=str,
)
def test_partition_spec(axes, shape, expected):
    found = partition_spec(axes, shape, SIZES, DEFAULT_SHARDING)
    split = lambda spec: [(entry,) if isinstance(entry, str) else entry for entry in spec]
    assert split(found) == split(expected)


def test_partition_spec_without_rules_keeps_everything_whole():
    assert partition_spec(("embed", "heads"), (8, 8), SIZES, ()) == PartitionSpec()


def test_partition_spec_names_an_unknown_axis():
    with pytest.raises(ValueError, match="no sharding rule for the logical axis 'widht'; known: batch, embed, "):
        partition_spec(("widht",), (8,), SIZES, DEFAULT_SHARDING)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": -1, "fsdp": 2, "tensor": 1}, (4, 2, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 8}, (1, 1, 8)),
    ],
    ids=str,
)
def test_make_mesh(sizes, expected):
    mesh = make_mesh(sizes)
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == expected
    assert {*mesh.axis_types} == {jax.sharding.AxisType.Auto}
    assert len(set(mesh.devices.flat)) == 8


def test_make_mesh_of_some_devices():
    assert list(make_mesh({"data": 1, "fsdp": 2}, jax.devices()[3:5]).devices.flat) == jax.devices()[3:5]


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX looks at in a TPU to place a mesh."""

    id: int
    coords: tuple[int, ...]
    slice_index: int
    device_kind: str = "TPU v6 lite"
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0


@pytest.mark.parametrize("sizes", [(1, 16, 1), (2, 8, 1), (4, 4, 1), (2, 4, 2), (8, 2, 1), (1, 2, 8)])
@pytest.mark.parametrize("slices", [1, 2])
def test_any_sizes_that_multiply_fit_a_torus(sizes, slices):
    """Also those that split an axis of it, as 2 x 8 does a torus of 4 x 4."""
    chips = [Chip(16 * s + 4 * y + x, (x, y, 0), s) for s in range(slices) for y in range(4) for x in range(4)]
    data, *others = sizes
    unchecked = inspect.unwrap(make_mesh)  # they are no jax.Device
    placed = unchecked(dict(zip(SIZES, (data * slices, *others), strict=True)), chips).devices
    assert placed.shape == (data * slices, *others)
    assert set(placed.flat) == set(chips)
    assert all(len({chip.slice_index for chip in copy.flat}) == 1 for copy in placed)


@pytest.mark.parametrize(
    "sizes", [(2, 2, 1), (3, -1, 1), (16, -1, 1), (-1, -1, 2), (0, -1, 1), (-2, 2, -2), (16, 1, 1)]
)
def test_make_mesh_refuses_sizes_that_do_not_fit(sizes):
    with pytest.raises(UserError, match=f"config.mesh data={sizes[0]} x fsdp={sizes[1]} .* does not fit 8 devices"):
        make_mesh(dict(zip(SIZES, sizes, strict=True)))


def test_constrain():
    x = jnp.ones((4, 6, 8))
    assert constrain(x, "batch", None, "embed") is x
    mesh = make_mesh(SIZES)
    with use_mesh(mesh, ()):
        assert constrain(x, "batch", None, "embed") is x
    with use_mesh(mesh, DEFAULT_SHARDING):
        placed = jax.jit(lambda x: constrain(x, "batch", None, "heads"))(x)
        assert placed.sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor")
        with pytest.raises(ValueError, match="no sharding rule"):
            constrain(x, "batch", None, "width")
    assert constrain(x, "batch", None, "embed") is x


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", ["float32", "nf4"])
def test_parameters_are_made_in_their_places(dtype):
    """A quantised kernel's numbers and scales each have the sharding their shape allows."""
    make = lambda: Linear(128, 16, axes=("embed", "mlp"), kernel_dtype=dtype, num_layers=3, rngs=nnx.Rngs(0))
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    _, state = abstract(make)
    places = [place.spec for place in jax.tree.leaves(shardings(state, mesh, DEFAULT_SHARDING))]
    kernel = init_sharded(make, mesh, DEFAULT_SHARDING).kernel.get_value()
    assert isinstance(kernel, qwix.QArray) == (dtype == "nf4")
    assert [leaf.sharding.spec for leaf in jax.tree.leaves(kernel)] == places
    shards = [leaf.addressable_shards[0].data.shape for leaf in jax.tree.leaves(kernel)]
    # Four devices do not divide the two blocks of scales, which stay whole along the inputs.
    assert shards == ([(3, 32, 8)] if dtype == "float32" else [(3, 32, 8), (3, 2, 8)])
    for ours, expected in zip(jax.tree.leaves(kernel), jax.tree.leaves(make().kernel.get_value()), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("name, down", [("stage1_merr", "fsdp"), ("stage1_v5e_16", None), ("stage1_v5e_256", None)])
def test_recipes_may_keep_the_down_projections_whole(name, down):
    config = load_config(name)
    _, state = abstract(lambda: Llama(config.llama, config.lora, rngs=nnx.Rngs(0)))
    mlp = shardings(state, make_mesh({"data": 1, "fsdp": 8, "tensor": 1}), config.sharding).layers.mlp
    assert mlp.down_proj.kernel.get_value().spec[2] == down
    assert mlp.up_proj.kernel.get_value().spec[1] == "fsdp"
