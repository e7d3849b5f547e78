"""Writes a run's checkpoints while it trains, and restores the newest when it resumes.

    with Checkpoints(workdir, keep=2) as checkpoints:
        step = checkpoints.newest
        state = checkpoints.restore(step, state, iterator)
        checkpoints.save(step, state, iterator, meta)

The layout is in `runs/checkpoint_files.py`. Saving copies the state off the devices and leaves the writing to a
thread; Orbax puts the folder into place in one move, and `files.json`, written after that, seals it. The first process
reads the seal for all, so that all resume from the same step.
"""

import concurrent.futures
import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from emollama_jax.distributed import barrier
from emollama_jax.errors import UserError
from emollama_jax.io.file_list import find_damage, write_file_list
from emollama_jax.io.locks import exclusive_lock, lock_file
from emollama_jax.io.orbax_arrays import restore_arguments, restore_arrays, save_arrays, shape_structs
from emollama_jax.io.paths import as_path
from emollama_jax.runs.checkpoint_files import (
    CHECKPOINTS,
    DATA,
    FIXED,
    LOCK,
    META,
    OPT_STATE,
    PARAMS,
    STATE,
    TRAINABLE,
    check_fixed,
    find_steps,
    fixed_digest,
    has_old_layout,
    read_data_state,
)
from emollama_jax.runs.run import Run

ASIDE = "damaged_{step}"  # what cannot be used, beside the checkpoints; not below a new folder: buckets have none

State = TypeVar("State")  # a pytree with the fields `trainable`, `opt_state` and `step`


class Checkpoints:
    """The checkpoints of the run in `workdir`, which no other process may train in meanwhile.

    As a context it waits for what is being written, unless it ends by an error.

    Attributes:
        workdir: the run's folder.
        newest: the step of the newest sound checkpoint; None if there is none. Newer ones that are not sound are put
            aside, and `log` is told of it.
    """

    def __init__(self, workdir: epath.PathLike, *, keep: int, log: Callable[[str], None] = print):
        """Keeps the `keep` newest checkpoints, and the best.

        Raises:
            UserError: another process trains in the folder.
        """
        self.workdir = as_path(workdir)
        with contextlib.ExitStack() as lock:
            if jax.process_index() == 0:
                lock.enter_context(_lock(self.workdir))
                for half in self.workdir.glob("*.orbax-checkpoint-tmp*"):  # of a run that was killed as it began
                    half.rmtree()
            self.newest = self._find_newest(log)
            self._thread = concurrent.futures.ThreadPoolExecutor(1, "seal")
            self._sealed = concurrent.futures.Future()
            self._sealed.set_result(None)
            self._best = _Best()
            self._manager = self._make_manager(keep)
            self._lock = lock.pop_all()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            if error is None:
                self.wait()
                self._manager.close()
            self._thread.shutdown(wait=error is None)

    def _make_manager(self, keep: int) -> ocp.CheckpointManager:
        policy = ocp.checkpoint_managers.AnyPreservationPolicy([ocp.checkpoint_managers.LatestN(keep), self._best])
        manager = ocp.CheckpointManager(
            self.workdir / CHECKPOINTS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                cleanup_tmp_directories=True,
            ),
        )
        manager.wait_until_finished()  # the cleaning up would complain if the process ended meanwhile
        return manager

    def _find_newest(self, log: Callable[[str], None]) -> int | None:
        found = -1
        if jax.process_index() == 0:
            for step in reversed(find_steps(self.workdir)):
                folder = self.folder(step)
                problem = find_damage(folder)
                if problem is None:
                    found = step
                    break
                aside = self.workdir / ASIDE.format(step=step)
                log(f"checkpoint of step {step} is {problem}: {folder}; put aside as {aside}")
                if aside.exists():
                    aside.rmtree()
                folder.rename(aside)
        if jax.process_count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(found))
        return None if found < 0 else found

    def folder(self, step: int) -> epath.Path:
        """Returns the folder of a step's checkpoint."""
        return self.workdir / CHECKPOINTS / str(step)

    def open_newest(self) -> Run | None:
        """Returns the run at its newest sound checkpoint; None if there is none."""
        return None if self.newest is None else Run(self.folder(self.newest), self.workdir)

    def restore(self, step: int, state: State, iterator: grain.DatasetIterator) -> State:
        """Restores the state saved at `step`, and the iterator to where it was then.

        Args:
            state: says how the arrays are placed, on whatever mesh.
        """
        like = shape_structs(named_arrays(state))
        parts = {STATE: like} if has_old_layout(self.folder(step)) else _split(like)
        how = {part: restore_arguments(arrays) for part, arrays in parts.items()}
        iterator.set_state(read_data_state(self.folder(step)))
        iterator.start_prefetch()
        found = self._manager.restore(step, args=ocp.args.Composite(**how))
        values = {name: value for part in parts for name, value in found[part].items()}
        return jax.tree.unflatten(jax.tree.structure(state), [values[name] for name in like])

    def save(
        self,
        step: int,
        state: State,
        iterator: grain.DatasetIterator,
        meta: Mapping[str, Any],
        *,
        best: int | None = None,
    ) -> None:
        """Starts to write a checkpoint, after the one before has been written. `best` is the step of the best one."""
        self.wait()
        self._best.step = best
        arrays = {part: ocp.args.PyTreeSave(arrays) for part, arrays in _split(named_arrays(state)).items()}
        others = {META: ocp.args.JsonSave(dict(meta)), DATA: grain.checkpoint.CheckpointSave(iterator)}
        self._manager.save(step, force=True, args=ocp.args.Composite(**arrays, **others))
        self._sealed = self._thread.submit(self._seal, step)
        self.newest = step

    def wait(self) -> None:
        """Waits until all is written and sealed; what went wrong in writing is raised here."""
        self._sealed.result()

    def save_fixed(self, arrays: Mapping[str, Any]) -> str:
        """Writes what a new run keeps but does not train, once for all of its checkpoints, in place of what another run
        left in the folder.

        Returns:
            its digest, for the checkpoints' `meta` ("fixed").
        """
        if arrays:
            save_arrays(self.workdir / FIXED, arrays)
        if jax.process_index() == 0:
            if arrays:
                write_file_list(self.workdir / FIXED)
            else:
                (self.workdir / FIXED).rmtree(missing_ok=True)
        barrier("fixed")
        return fixed_digest(self.workdir)

    def restore_fixed(self, params: Mapping[str, jax.Array], digest: str | None) -> dict[str, jax.Array]:
        """Restores parameters that the run keeps but does not train, placed as `params` are.

        Raises:
            UserError: as `check_fixed`.
        """
        if not (params and check_fixed(self.workdir, digest)):
            return {}
        remedy = "train again in another folder"
        return restore_arrays(self.workdir / FIXED, shape_structs(params), partial=True, remedy=remedy)

    def _seal(self, step: int) -> None:
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            write_file_list(self.folder(step))


@contextlib.contextmanager
def _lock(workdir: epath.Path) -> Iterator[None]:
    """Holds the run's folder, and says in it which process does."""
    file = lock_file(workdir / LOCK)
    holder = file.read_text(encoding="utf-8") if file.exists() else ""
    busy = UserError(
        f"another process{holder and f' ({holder})'} trains in this folder: {workdir}; wait for it, end it, or choose "
        "another folder: --config.train.workdir=NEW"
    )
    with exclusive_lock(workdir / LOCK, busy) as lock:
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


class _Best(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoint of the best step."""

    def __init__(self):
        self.step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        return [checkpoint.step == self.step for checkpoint in checkpoints]


def named_arrays(state: Any) -> dict[str, Any]:
    """Returns the arrays of a state by name: trainable.PATH, opt_state.PATH and step."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
    return {name(path): leaf for path, leaf in leaves}


def _split(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Splits the arrays of a state into the parts of a checkpoint, so that inference reads no more than it needs."""
    parts: dict[str, dict[str, Any]] = {PARAMS: {}, OPT_STATE: {}}
    for name, array in arrays.items():
        parts[PARAMS if name.startswith(TRAINABLE) else OPT_STATE][name] = array
    return parts
