"""A run's checkpoints: written beside the training, read where the run goes on.

    with Checkpoints(workdir, keep=2) as checkpoints:
        step = checkpoints.newest
        state = checkpoints.restore(step, state, iterator)
        checkpoints.save(step, state, iterator, meta)

The layout is in `weights/runs.py`. Saving copies the state off the devices and leaves the writing to a thread; Orbax
puts the folder into place in one move, and `files.json`, written after that, seals it. The first process reads the seal
for all, so that all go on from the same step.
"""

import concurrent.futures
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from emollama_jax.train.step import TrainState
from emollama_jax.weights.runs import CHECKPOINTS, DATA, META, STATE, damage, read_meta, steps_of, write_file_list

ASIDE = "damaged_{step}"  # what cannot be used, beside the checkpoints; not below a new folder: buckets have none


class Checkpoints:
    """The checkpoints of the run in `workdir`; a context that, unless it ends by an error, waits for what is being
    written.

    Attributes:
        workdir: the run's folder.
        newest: the step of the newest sound checkpoint; None if there is none. Newer ones that are not sound are put
            aside, and `log` is told of it.
    """

    def __init__(self, workdir: epath.Path, *, keep: int, log: Callable[[str], None] = print):
        """Of the checkpoints `keep` newest ones are kept, and the best."""
        self.workdir = workdir
        self.newest = self._find_newest(log)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "seal")
        self._sealed = concurrent.futures.Future()
        self._sealed.set_result(None)
        self._best = _Best()
        policy = ocp.checkpoint_managers.AnyPreservationPolicy([ocp.checkpoint_managers.LatestN(keep), self._best])
        self._manager = ocp.CheckpointManager(
            workdir / CHECKPOINTS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                cleanup_tmp_directories=True,
            ),
        )
        self._manager.wait_until_finished()  # the cleaning up would complain if the process ended meanwhile

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
            self._manager.close()
        self._thread.shutdown(wait=error is None)

    def _find_newest(self, log: Callable[[str], None]) -> int | None:
        found = -1
        if jax.process_index() == 0:
            for step in reversed(steps_of(self.workdir)):
                folder = self.workdir / CHECKPOINTS / str(step)
                problem = damage(folder)
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

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays."""
        return read_meta(self.workdir / CHECKPOINTS / str(step))

    def restore(self, step: int, state: TrainState, iterator: grain.DatasetIterator) -> TrainState:
        """The state saved at `step`, placed as the arrays of `state` are, on whatever mesh; the iterator goes on from
        where it was."""
        like = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in named_arrays(state).items()
        }
        how = ocp.args.PyTreeRestore(item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))
        found = self._manager.restore(
            step, args=ocp.args.Composite(**{STATE: how, DATA: grain.checkpoint.CheckpointRestore(iterator)})
        )
        return jax.tree.unflatten(jax.tree.structure(state), [found[STATE][name] for name in like])

    def save(
        self,
        step: int,
        state: TrainState,
        iterator: grain.DatasetIterator,
        meta: Mapping[str, Any],
        *,
        best: int | None = None,
    ) -> None:
        """Begins to write a checkpoint, after the one before has been written. `best` is the step of the best one."""
        self.wait()
        self._best.step = best
        self._manager.save(
            step,
            force=True,
            args=ocp.args.Composite(
                **{
                    STATE: ocp.args.PyTreeSave(named_arrays(state)),
                    META: ocp.args.JsonSave(dict(meta)),
                    DATA: grain.checkpoint.CheckpointSave(iterator),
                }
            ),
        )
        self._sealed = self._thread.submit(self._seal, step)
        self.newest = step

    def wait(self) -> None:
        """Until all is written and sealed; what went wrong in writing is raised here."""
        self._sealed.result()

    def _seal(self, step: int) -> None:
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            write_file_list(self.workdir / CHECKPOINTS / str(step))


class _Best(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoint of the best step."""

    def __init__(self):
        self.step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        return [checkpoint.step == self.step for checkpoint in checkpoints]


def named_arrays(state: TrainState) -> dict[str, jax.Array]:
    """The arrays of a state by name: trainable.PATH, opt_state.PATH and step."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
    return {name(path): leaf for path, leaf in leaves}
