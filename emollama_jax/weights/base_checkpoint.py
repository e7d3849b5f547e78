"""Base checkpoints: a frozen model as Orbax arrays that every host reads straight into its shards.

model.json     the model's LlamaConfig, fingerprints of its parameters and of those it was made of, and their name
params/NAME/   one parameter (Orbax), as it is stored on the device: float, int8 or nf4
tokenizer...   the tokenizer's files
files.json     size and SHA-256 of each of these files, by which damage is seen (`io/file_list.py`)

Parameters are written and read one after another: the host holds one beside those that are on the devices. Those of
format 2 lie in one Orbax folder, `params/`; those of format 1 have no `files.json`, either.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from emollama_jax.errors import UserError
from emollama_jax.io.atomic import write_json
from emollama_jax.io.file_list import find_damage, write_file_list
from emollama_jax.io.orbax_arrays import restore_arrays, save_arrays
from emollama_jax.io.paths import PathLike, as_path, is_remote
from emollama_jax.models.layers import QUANTISED
from emollama_jax.models.llama import Llama, LlamaConfig
from emollama_jax.models.lora import is_adapter
from emollama_jax.sharding import AxisRules, abstract, shardings
from emollama_jax.weights.engine import LoadReport, first_device, initial_values, param_values, set_params
from emollama_jax.weights.locate import is_hub_name

MANIFEST, PARAMS = "model.json", "params"
FORMAT, ONE_FOLDER, UNSEALED = 3, 2, 1

_log = logging.getLogger(__name__).warning


def is_base_checkpoint(path: PathLike) -> bool:
    """Returns whether this is the folder of a base checkpoint. The name of a model on the hub is none, and nothing is
    asked of the hub."""
    return not is_hub_name(path) and (as_path(path) / MANIFEST).is_file()


def save_base(folder: PathLike, model: Llama, *, source: str, origin: str = "") -> str:
    """Writes the frozen parameters of a model: see `write_base`."""
    values = param_values(nnx.state(model, nnx.Not(is_adapter)))
    return write_base(folder, sorted(values.items()), model.config, source=source, origin=lambda: origin)


def write_base(
    folder: PathLike,
    params: Iterable[tuple[str, Any]],
    config: LlamaConfig,
    *,
    source: str,
    origin: Callable[[], str] = lambda: "",
) -> str:
    """Writes parameters into an existing folder, each as it comes, seals it with what is there already, such as the
    tokenizer's files, and returns the parameters' fingerprint.

    Args:
        params: by path, sorted by it.
        source: says in words where the weights came from.
        origin: gives the `ModelIdentity.origin` of the weights at the end; "" where they are not a file's as they were.

    Raises:
        UserError: a parameter holds NaN or infinity; nothing is left in the folder then.
    """
    folder, digest = as_path(folder), hashlib.sha256()
    try:
        for path, value in params:
            _check_finite(path, value)
            _add_to_digest(digest, path, value)
            save_arrays(folder / PARAMS / path, _packed({path: value}))
            del value  # before the next one is made
    except UserError:
        (folder / PARAMS).rmtree(missing_ok=True)  # those before it
        raise
    fingerprint = f"sha256:{digest.hexdigest()}"
    manifest = {
        "format": FORMAT,
        # Which kernel runs is a matter of the devices at hand, not of the file.
        "llama": dataclasses.asdict(dataclasses.replace(config, attention="auto")),
        "fingerprint": fingerprint,
        "origin": origin(),
        "source": source,
    }
    write_json(folder / MANIFEST, manifest)
    write_file_list(folder)
    return fingerprint


def read_manifest(path: PathLike) -> dict[str, Any]:
    """What `model.json` says.

    Raises:
        UserError: it is damaged or of a format that this version does not know, or a file is missing or of another
            size.
    """
    file = as_path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        if manifest["format"] not in (FORMAT, ONE_FOLDER, UNSEALED):
            raise UserError(f"base checkpoint of format {manifest['format']}, not {FORMAT}: {file}; convert it again")
        if missing := {"llama", "fingerprint", "source"} - set(manifest):
            raise KeyError(", ".join(sorted(missing)))
        manifest["llama"] = LlamaConfig(**manifest["llama"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"damaged base checkpoint: {file} ({error}); convert the model again") from error
    if manifest["format"] != UNSEALED:
        _check_files(path, lambda name: name == MANIFEST)
    return manifest


def is_sealed(path: PathLike) -> bool:
    """Returns whether a base checkpoint lists its files. Raises UserError as `read_manifest`."""
    return read_manifest(path)["format"] != UNSEALED


def check_base(path: PathLike, is_read: Callable[[str], bool]) -> None:
    """Compares the files that are to be read with what was written, the others by their size; see `find_damage`.

    Of several processes one reads all of a checkpoint in an object store.

    Raises:
        UserError: a file is missing or not what was written.
    """
    if is_sealed(path):
        _check_files(path, is_read)
    elif is_read(PARAMS):
        _log(f"base checkpoint of format {UNSEALED}, which cannot be checked: {path}; convert the model again")


def _check_files(path: PathLike, is_read: Callable[[str], bool]) -> None:
    if is_remote(path) and jax.process_index() > 0:
        is_read = lambda name: name == MANIFEST
    if problem := find_damage(path, is_read):
        raise UserError(f"base checkpoint {problem}: {path}; convert the model again")


def load_base(
    path: PathLike,
    build: Callable[[LlamaConfig], Callable[[], Llama]],
    execution: Mapping[str, Any],
    *,
    mesh: Mesh | None = None,
    rules: AxisRules = (),
) -> tuple[Llama, LoadReport]:
    """A model from a base checkpoint. `build(config)` gives the function that makes it; `execution` overrides fields
    of the stored config. Float parameters are cast where a field asks for it; quantised ones stay as they are.

    Raises:
        UserError: the checkpoint is damaged, or holds kernels that cannot become what `execution` asks for.
    """
    manifest = read_manifest(path)
    stored, folder = manifest["llama"], as_path(path) / PARAMS
    config = dataclasses.replace(stored, **execution)
    if config.kernel_dtype != stored.kernel_dtype and {config.kernel_dtype, stored.kernel_dtype} & set(QUANTISED):
        raise UserError(
            f"the base checkpoint holds {stored.kernel_dtype} kernels, not {config.kernel_dtype}: {path}; "
            f"convert the original weights with --kernel-dtype {config.kernel_dtype}"
        )
    check_base(path, lambda name: name == PARAMS)
    graphdef, state = abstract(build(config))
    param_shardings = param_values(shardings(state, mesh or first_device(), rules if mesh else ()))
    frozen = param_values(nnx.filter_state(state, nnx.Not(is_adapter)))
    where = {path: sharding for path, sharding in param_shardings.items() if path in frozen}
    items = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(_packed, frozen),
        where,
    )
    values = {}
    for name, item in items.items():
        of_one = folder / name if manifest["format"] == FORMAT else folder
        packed = restore_arrays(of_one, {name: item}, partial=True, remedy="convert it again")
        values[name] = _unpacked(packed.pop(name), frozen[name], where[name])
    adapters = tuple(name for name in param_values(state) if name not in frozen)
    set_params(state, values | initial_values(build(config), adapters, param_shardings))
    return nnx.merge(graphdef, state), LoadReport(tuple(frozen), (), adapters)


def fingerprint_of(values: Mapping[str, Any]) -> str:
    """SHA-256 over paths, dtypes, shapes and bytes of the parameters, one layer on the host at a time."""
    digest = hashlib.sha256()
    for path in sorted(values):
        _add_to_digest(digest, path, values[path])
    return f"sha256:{digest.hexdigest()}"


def _add_to_digest(digest: Any, path: str, value: Any) -> None:
    for leaf in jax.tree.leaves(value):
        digest.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
        for part in leaf if leaf.ndim == 3 else [leaf]:
            digest.update(np.ascontiguousarray(np.asarray(part)).tobytes())


def _check_finite(path: str, value: Any) -> None:
    """Raises UserError for a parameter, as it is stored, that is not of finite numbers."""
    for leaf in jax.tree.leaves(value):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not _is_finite(leaf):
            raise UserError(
                f"NaN or infinity in the parameter {path}, stored as {leaf.dtype}; store it as bfloat16 or "
                "float32, and if that fails too, get the weights again"
            )


@jax.jit
def _is_finite(x):
    return jnp.all(jnp.isfinite(x))


def _packed(values):
    """4-bit arrays as bytes, two numbers of the last axis in each: TensorStore has no unsigned 4-bit type."""

    @jax.jit
    def pack(x):
        even, odd = x[..., 0::2].astype(jnp.uint8), x[..., 1::2].astype(jnp.uint8)
        return even | (odd << 4)

    return jax.tree.map(lambda x: pack(x) if x.dtype == jnp.uint4 else x, values)


def _unpacked(packed, like, sharding):
    """The inverse of `_packed`, given the abstract values and the sharding of each array."""

    def unpack(x, like, sharding):
        pairs = lambda x: jnp.stack([x & 15, x >> 4], axis=-1).reshape(like.shape).astype(like.dtype)
        return jax.jit(pairs, out_shardings=sharding)(x) if like.dtype == jnp.uint4 else x

    return jax.tree.map(unpack, packed, like, sharding)
