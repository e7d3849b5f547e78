"""Arrays in Orbax folders: written, restored onto their shardings, or read on the host."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from emollama_jax.errors import UserError, first_line
from emollama_jax.io.paths import as_path


def save_arrays(folder: epath.PathLike, arrays: Mapping[str, Any]) -> None:
    """Writes arrays, or pytrees of arrays, by name. A folder that exists is replaced."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(as_path(folder), args=ocp.args.PyTreeSave(dict(arrays)), force=True)


def restore_arguments(like: Mapping[str, Any], *, partial: bool = False) -> ocp.args.PyTreeRestore:
    """Returns Orbax's arguments that restore arrays as `like` describes them.

    Args:
        like: `ShapeDtypeStruct`s with shardings, or pytrees of them, by name.
        partial: whether the folder may hold more names than these.
    """
    how = ocp.checkpoint_utils.construct_restore_args(like)
    return ocp.args.PyTreeRestore(item=like, restore_args=how, partial_restore=partial)


def restore_arrays(
    folder: epath.PathLike, like: Mapping[str, Any], *, partial: bool = False, remedy: str
) -> dict[str, Any]:
    """Restores arrays straight onto their shardings; see `restore_arguments`.

    Raises:
        UserError: the files are missing or damaged; the message ends with `remedy`.
    """
    return _restore(as_path(folder), ocp.PyTreeCheckpointHandler(), restore_arguments(like, partial=partial), remedy)


def read_arrays(
    folder: epath.PathLike, wanted: Callable[[str], bool] = lambda name: True, *, remedy: str = "copy them again"
) -> dict[str, np.ndarray]:
    """Reads the arrays with the names that are `wanted`, on the host.

    Raises:
        UserError: the files are missing or damaged; the message ends with `remedy`.
    """
    folder, handler = as_path(folder), ocp.PyTreeCheckpointHandler()
    try:
        names = [name for name in handler.metadata(folder).tree if wanted(name)]
    except Exception as error:
        raise _damaged(folder, error, remedy) from error
    if not names:
        return {}
    how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    arguments = ocp.args.PyTreeRestore(item=dict.fromkeys(names, 0), restore_args=how, partial_restore=True)
    return _restore(folder, handler, arguments, remedy)


def shape_structs(arrays: Mapping[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
    """Describes arrays by their shapes, dtypes and shardings."""
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in arrays.items()}


def _restore(
    folder: epath.Path, handler: ocp.PyTreeCheckpointHandler, arguments: ocp.args.PyTreeRestore, remedy: str
) -> dict[str, Any]:
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(folder, args=arguments)
    except Exception as error:  # Orbax and TensorStore have no common class for what damaged files raise
        raise _damaged(folder, error, remedy) from error


def _damaged(folder: epath.Path, error: Exception, remedy: str) -> UserError:
    return UserError(f"damaged arrays: {folder} ({first_line(error)}); {remedy}")
