"""From logical axis names to devices.

Modules name the axes of their parameters and activations ("embed", "heads", "batch", ...). One table, the *rules*,
maps each name to mesh axes; it is given in the configuration, so that no module knows how the mesh is laid out.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from flax import nnx
from flax.core import spmd
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from emollama_jax.errors import UserError

AxisRules = Sequence[tuple[str, str | Sequence[str] | None]]


def make_mesh(axis_sizes: dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all); `axis_sizes` in order from the slowest to the fastest interconnect.

    One size may be -1: whatever devices the other axes leave. Where TPUs lie in several slices, the first axis
    goes over the slices and the others stay within one.

    Raises:
        UserError: the sizes do not multiply to the number of devices, or the first is no multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(axis_sizes, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    if slices > 1:
        (first, size), *others = sizes.items()
        if size % slices:
            raise UserError(f"config.mesh.{first}={size} does not fit {slices} slices; give a multiple of them")
        within, across = (size // slices, *(size for _, size in others)), (slices, *[1] * len(others))
        placed = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    else:
        placed = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def mesh_sizes(axis_sizes: dict[str, int], devices: int) -> dict[str, int]:
    """The sizes with the one that is -1, if any, replaced by the devices that the others leave.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    sizes = dict(axis_sizes)
    for name in [name for name, size in sizes.items() if size == -1][:1]:
        known = -math.prod(sizes.values())
        sizes[name] = devices // known if known else 0
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != devices:
        wanted = " x ".join(f"{n}={s}" for n, s in axis_sizes.items())
        raise UserError(
            f"config.mesh {wanted} does not fit {devices} devices; the sizes must multiply to that number, and one "
            "may be -1 for all devices that the others leave"
        )
    return sizes


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: AxisRules) -> Iterator[None]:
    """Within the block `constrain` places activations on `mesh` after `rules`."""
    with jax.set_mesh(mesh), spmd.logical_axis_rules(tuple(rules)):
        yield


def partition_spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh_shape: dict[str, int], rules: AxisRules
) -> PartitionSpec:
    """The mesh axes of each dimension. A dimension that its mesh axes do not divide stays whole, as do the scales of
    a quantised kernel along the axes they are shared over; a mesh axis serves the first dimension that asks for it.
    Without rules everything stays whole."""
    if not rules:
        return PartitionSpec()
    table, used, entries = dict(rules), set(), []
    for name, size in zip(axes, shape, strict=True):
        if name is not None and name not in table:
            raise ValueError(f"no sharding rule for the logical axis {name!r}; known: {', '.join(table)}")
        wanted = table.get(name) or ()
        wanted = tuple(a for a in ((wanted,) if isinstance(wanted, str) else wanted) if a not in used)
        fits = size % int(np.prod([mesh_shape[a] for a in wanted])) == 0
        entries.append(wanted if wanted and fits else None)
        used.update(entries[-1] or ())
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` with the sharding its logical axes have under the mesh in use; `x` itself without one."""
    mesh, rules = jax.sharding.get_abstract_mesh(), spmd.get_logical_axis_rules()
    if mesh.empty or not rules:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, dict(mesh.shape), rules))


def shardings(tree: nnx.State, mesh: Mesh, rules: AxisRules) -> nnx.State:
    """The sharding of every leaf of an NNX state (arrays, abstract arrays or quantised arrays)."""

    def of_variable(variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata("out_sharding", None)

        def of_leaf(leaf) -> NamedSharding:
            spec = partition_spec(axes, leaf.shape, dict(mesh.shape), rules) if axes else PartitionSpec()
            return NamedSharding(mesh, spec)

        return variable.replace(jax.tree.map(of_leaf, variable.get_value()))

    return jax.tree.map(of_variable, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def abstract(make_model: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure and its state with shapes and dtypes only: nothing is allocated.

    `nnx.eval_shape` is not used because, under a mesh, it replaces a quantised kernel by a plain array.
    """
    return jax.eval_shape(lambda: nnx.split(make_model()))


def init_sharded(make_model: Callable[[], nnx.Module], mesh: Mesh, rules: AxisRules) -> nnx.Module:
    """The model with every parameter initialised straight to its shards."""
    graphdef, state = abstract(make_model)
    init = jax.jit(lambda: nnx.state(make_model()), out_shardings=shardings(state, mesh, rules))
    return nnx.merge(graphdef, init())
