"""One engine between named tensors in files and the parameters of a model.

A `Table` says which tensor belongs to which parameter, both ways. Tensor names are templates: "{layer}" stands for a
layer's number, and the parameter it belongs to holds all layers stacked along a leading axis. Loading is complete or
an error: every tensor is used or on the table's drop list, every parameter is filled or on its init list.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx

from emollama_jax.errors import UserError
from emollama_jax.models.layers import Linear, as_array, as_kernel
from emollama_jax.models.lora import merged_kernel
from emollama_jax.sharding import AxisRules, abstract, make_mesh, shardings
from emollama_jax.weights.tensors import WeightSource, check_fits


@dataclass(frozen=True)
class Transform:
    """A change of layout between a file's tensor and one layer of a parameter, and its inverse."""

    into: Callable[[np.ndarray], np.ndarray]
    out: Callable[[np.ndarray], np.ndarray]


SAME = Transform(lambda x: x, lambda x: x)
TRANSPOSE = Transform(lambda x: x.T, lambda x: x.T)  # of a convolution: [out, in, K] <-> [K, in, out]


@dataclass(frozen=True)
class Rule:
    """A tensor's name template, the path of its parameter, and the layout change between them."""

    tensor: str
    param: str
    transform: Transform = SAME


@dataclass(frozen=True)
class Table:
    """Which tensor is which parameter.

    Attributes:
        rules: at most one for each parameter.
        drop: patterns of tensor names that are known and not needed.
        init: patterns of parameter paths that keep their initial values when the file has nothing for them.
    """

    rules: tuple[Rule, ...]
    drop: tuple[str, ...] = ()
    init: tuple[str, ...] = ()


# A tensor's name, the change of its layout, and its index in the parameter: (layer,), or () where it is all of it.
PlannedTensor = tuple[str, Transform, tuple[int, ...]]


@dataclass(frozen=True)
class LoadReport:
    """What became of a file's tensors and of the model's parameters."""

    read: tuple[str, ...]
    dropped: tuple[str, ...]
    initialised: tuple[str, ...]


def load(
    make_model: Callable[[], nnx.Module],
    source: WeightSource,
    table: Table,
    *,
    mesh: jax.sharding.Mesh | None = None,
    rules: AxisRules = (),
) -> tuple[nnx.Module, LoadReport]:
    """The model with its parameters read from `source`, each cast or quantised as the model stores it.

    Tensors are read one at a time and go straight to their shards on `mesh` (default: the first device), so the host
    holds about one tensor. Parameters on the init list get the values `make_model` gives them.

    Raises:
        UserError: tensors are missing, unknown or of the wrong shape; all of them are named.
    """
    graphdef, state = abstract(make_model)
    where = param_values(shardings(state, mesh or first_device(), rules if mesh else ()))
    values, report = read_params(source, table, param_values(state), where)
    values |= initial_values(make_model, report.initialised, where)
    set_params(state, values)
    return nnx.merge(graphdef, state), report


def read_params(
    source: WeightSource, table: Table, params: Mapping[str, Any], param_shardings: Mapping[str, Any]
) -> tuple[dict[str, Any], LoadReport]:
    """The values of `params` that are in `source`, by path.

    Args:
        params: by path, the values to replace or their abstract shapes: they say how each is stored.
        param_shardings: by path, the sharding of each array.

    Raises:
        UserError: as `load`.
    """
    values, report = stream_params(source, table, params, param_shardings)
    return dict(values), report


def stream_params(
    source: WeightSource, table: Table, params: Mapping[str, Any], param_shardings: Mapping[str, Any]
) -> tuple[Iterator[tuple[str, Any]], LoadReport]:
    """As `read_params`, but each value is read when its turn comes, in the order of the paths."""
    plan, report = _plan(source, table, params)
    values = ((path, _fill(source, plan[path], params[path], param_shardings[path])) for path in sorted(plan))
    return values, report


def param_values(state: nnx.State) -> dict[str, Any]:
    """The values of a state by dotted path; a quantised kernel is one value."""
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def set_params(state: nnx.State, values: Mapping[str, Any]) -> None:
    """Puts values by dotted path into a state, in place."""
    for path, variable in nnx.to_flat_state(state):
        if (name := ".".join(map(str, path))) in values:
            variable.set_value(values[name])


def export(
    model: nnx.Module, table: Table, *, dtype: str | None = None, merge_adapters: bool = False
) -> Iterator[tuple[str, np.ndarray]]:
    """The model's parameters under the table's tensor names, one at a time, as host arrays.

    Args:
        dtype: of all tensors; default: the dtype of each parameter, bfloat16 for quantised kernels.
        merge_adapters: add each adapter to the kernel it belongs to.
    """
    for name, array, transform in _exported(model, table, dtype, merge_adapters):
        yield name, np.ascontiguousarray(transform.out(np.asarray(array)))


def export_on_device(model: nnx.Module, table: Table, *, dtype: str) -> Iterator[tuple[str, jax.Array]]:
    """As `export`, but the arrays stay where the parameters lie."""
    for name, array, transform in _exported(model, table, dtype, merge_adapters=False):
        yield name, transform.out(array)


def _exported(
    model: nnx.Module, table: Table, dtype: str | None, merge_adapters: bool
) -> Iterator[tuple[str, jax.Array, Transform]]:
    """(a tensor's name, its values in the parameter's layout, the layouts) of all tensors."""
    for rule in table.rules:
        *parent, leaf = rule.param.split(".")
        module = functools.reduce(getattr, parent, model)
        graphdef, state = nnx.split(module)
        value = getattr(module, leaf).get_value()
        out = dtype or ("bfloat16" if isinstance(value, qwix.QArray) else value.dtype)
        for layer in range(value.shape[0]) if "{layer}" in rule.tensor else (None,):
            one = module if layer is None else nnx.merge(graphdef, jax.tree.map(lambda x: x[layer], state))  # noqa: B023
            merged = merge_adapters and leaf == "kernel" and isinstance(one, Linear)
            array = merged_kernel(one) if merged else as_array(getattr(one, leaf).get_value())
            name = rule.tensor.format(layer=layer)
            yield name, array.astype(out), rule.transform


def _plan(
    source: WeightSource, table: Table, params: Mapping[str, Any]
) -> tuple[dict[str, list[PlannedTensor]], LoadReport]:
    """For each parameter the tensors that fill it.

    Every name and shape is checked before any data is read.
    """
    rules = {rule.param: rule for rule in table.rules}
    present = set(source.names())
    plan, initialised, expected = {}, [], {}  # expected: the shape of every tensor that the plan reads
    for path, value in params.items():
        names, rule = {}, rules.get(path)  # names: the index in the parameter of every tensor
        if rule is not None:
            stacked = "{layer}" in rule.tensor
            names = {rule.tensor.format(layer=i): (i,) for i in range(value.shape[0])} if stacked else {rule.tensor: ()}
        if not present & set(names) and _matches(table.init, path):
            initialised.append(path)
            continue
        if rule is None:
            raise ValueError(f"the table has no rule for the parameter {path}")
        layer = jax.ShapeDtypeStruct(value.shape[1:] if stacked else value.shape, np.float32)
        expected |= dict.fromkeys(names, jax.eval_shape(rule.transform.out, layer).shape)
        plan[path] = [(name, rule.transform, index) for name, index in names.items()]
    dropped = sorted(name for name in present - set(expected) if _matches(table.drop, name))
    _check(source, expected, dropped)
    return plan, LoadReport(tuple(expected), tuple(sorted((*dropped, *source.outside))), tuple(initialised))


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _check(source: WeightSource, expected: Mapping[str, tuple[int, ...]], dropped: Sequence[str]) -> None:
    """That the source has the expected tensors in their shapes, and otherwise only those that are dropped."""
    present = set(source.names())
    missing = sorted(set(expected) - present)
    unknown = sorted(present - set(expected) - set(dropped))
    shapes = {name: source.shape(name) for name in sorted(present & set(expected))}
    misshaped = [f"{n} is {list(s)}, not {list(expected[n])}" for n, s in shapes.items() if s != expected[n]]
    guesses = {name: difflib.get_close_matches(name, missing, 1, 0.9) for name in unknown}
    unknown = [name + (f" (for {guess[0]}?)" if guess else "") for name, guess in guesses.items()]
    found = {"missing": missing, "unknown": unknown, "of the wrong shape": misshaped}
    problems = "; ".join(f"{len(names)} {what}: {', '.join(names)}" for what, names in found.items() if names)
    if problems:
        raise UserError(f"the tensors do not fit the model: {source.path}; {problems}; check that it is the right file")


def _fill(source: WeightSource, tensors: list[PlannedTensor], like, sharding):
    """One parameter, assembled from its tensors on its devices.

    `like` is its abstract value (an array, or a quantised array) and `sharding` that of each of its arrays.
    """

    arrays, structure = jax.tree.flatten(like)
    dtype = np.dtype(np.float32) if isinstance(like, qwix.QArray) else arrays[0].dtype
    leaves = tuple(jax.tree.leaves(sharding))
    zeros, put = _compiled_fill(structure, tuple((x.shape, x.dtype) for x in arrays), leaves)
    value = zeros()
    for name, transform, index in tensors:
        array = source.read_weights(name)
        check_fits(name, array, dtype, source.path)
        jax.block_until_ready(value)  # one tensor is read while the one before is placed, and no more are on the host
        value = put(value, transform.into(array), index)
    return value


@functools.cache
def _compiled_fill(structure, arrays: tuple[tuple[tuple[int, ...], Any], ...], leaves: tuple[Any, ...]):
    """(a parameter of zeros, one with a tensor put in): compiled once for all parameters stored alike."""
    like = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*array) for array in arrays])
    sharding = jax.tree.unflatten(structure, leaves)

    def store(array):
        return as_kernel(array, like.qtype) if isinstance(like, qwix.QArray) else array.astype(like.dtype)

    @functools.partial(jax.jit, out_shardings=sharding)
    def zeros():
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=sharding)
    def put(value, array, index):
        return jax.tree.map(lambda v, a: v.at[index].set(a), value, store(array))

    return zeros, put


def initial_values(
    make_model: Callable[[], nnx.Module], paths: Sequence[str], param_shardings: Mapping[str, Any]
) -> dict[str, Any]:
    """Values of the named parameters as a new model has them; the others are not computed."""

    def init():
        values = param_values(nnx.state(make_model()))
        return {path: values[path] for path in paths}

    return jax.jit(init, out_shardings={path: param_shardings[path] for path in paths})() if paths else {}


def first_device() -> jax.sharding.Mesh:
    """The mesh of the first device, where parameters go by default."""
    return make_mesh({"device": 1}, jax.devices()[:1])
