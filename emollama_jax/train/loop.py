"""Training: one function from an experiment to a run's folder.

    outcome = train(config)

Where a run begins is decided in one place (`train/start.py`): it resumes from the newest sound checkpoint of its
folder; without one it begins with the weights of `weights.trained`; without these with new adapters and projectors. All
randomness comes from `seed` and a step's number, so a run that was stopped anywhere goes on as if it had not been.

A step's numbers are fetched while the devices work on the next one, so that they never wait for the host.
"""

import contextlib
import dataclasses
import enum
import json
import math
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emollama_jax.config import Config, to_dict
from emollama_jax.distributed import PreemptionGuard, barrier
from emollama_jax.errors import UserError
from emollama_jax.io.paths import as_path
from emollama_jax.sharding import make_mesh, use_mesh
from emollama_jax.train.checkpoints import Checkpoints
from emollama_jax.train.identity import check_paths
from emollama_jax.train.metrics import JsonLines, MultiWriter, Progress, Stopwatch, TensorBoard
from emollama_jax.train.optimizer import learning_rate, make_optimizer
from emollama_jax.train.report import NonFiniteError, Report, make_describe
from emollama_jax.train.setup import setup_run
from emollama_jax.train.step import make_step, multimodal_loss
from emollama_jax.train.validation import MoreMetrics
from emollama_jax.weights.runs import CHECKPOINTS, CONFIG

PROFILE = "profile"  # folder of the trace, in the run's


class End(enum.Enum):
    """How a run ended."""

    DONE = "all steps are done"
    EARLY = "the validation got no better"
    PREEMPTED = "asked to end"
    NON_FINITE = "the loss or its gradient was not finite"


@dataclass(frozen=True)
class Outcome:
    """How a run ended, after which step, the step of its best checkpoint where it validates, and more to say."""

    end: End
    step: int
    best: int | None
    message: str = ""


def train(config: Config, *, more_metrics: MoreMetrics | None = None) -> Outcome:
    """Trains until `train.steps`, or as long as the validation gets better, or until asked to end.

    Args:
        more_metrics: from the model to further metrics of a validation, such as scores of its labels; called by all
            processes.

    Raises:
        UserError: paths, data, sizes or devices that do not fit, or another run in the folder.
    """
    check_paths(config)
    watch, settings = Stopwatch(), config.train
    workdir, is_first = as_path(settings.workdir), jax.process_index() == 0
    progress = Progress(settings.steps)
    log = progress.log if is_first else lambda message: None
    mesh = _mesh_of(config)
    _use_compile_cache(settings.compile_cache)
    optimizer = make_optimizer(settings)

    with use_mesh(mesh, config.sharding), PreemptionGuard() as guard, contextlib.ExitStack() as stack:
        with watch.on("start"):
            checkpoints = stack.enter_context(Checkpoints(workdir, keep=settings.keep, log=log))
            run = setup_run(config, mesh, checkpoints, optimizer, more_metrics=more_metrics, log=log)
            stack.callback(run.iterator.close)
            if is_first:
                (workdir / CONFIG).write_text(json.dumps(to_dict(config), indent=2) + "\n")
            places = [JsonLines, TensorBoard] if is_first else []
            writer = MultiWriter([place(workdir, after=run.step) for place in places] + [progress] * is_first)
            stack.callback(writer.close)
        report = Report(
            writer,
            watch,
            run.datasets,
            positions=config.data.batch_rows * config.data.sequence_length,
            cost=run.cost,
            devices=list(mesh.devices.flat),
            rate=lambda step: float(learning_rate(settings, step - 1)),
            interval=settings.log_interval,
            skip=settings.non_finite == "skip",
            log=log,
        )
        train_step = make_step(
            run.graphdef,
            optimizer,
            multimodal_loss,
            grad_accum_steps=settings.grad_accum_steps,
            mesh=mesh,
        )
        describe = make_describe(mesh)
        compiled = None
        rng = jax.device_put(jax.random.key(config.seed), NamedSharding(mesh, PartitionSpec()))
        step, state, best, end = run.step, run.state, run.best, End.DONE
        first, last = settings.profile or (0, 0)
        profile = stack.enter_context(contextlib.ExitStack())

        def enough() -> bool:
            return bool(settings.patience) and best.worse >= settings.patience

        try:
            while step < settings.steps and not enough():
                step += 1
                if step == first:
                    profile.enter_context(jax.profiler.trace(str(workdir / PROFILE)))
                with watch.on("data"):
                    batch = next(run.iterator)
                if compiled is None:
                    with watch.on("compile"):
                        compiled = train_step.lower(state, run.frozen, batch, rng).compile()
                        barrier("compiled")
                state, values = compiled(state, run.frozen, batch, rng)
                report.add(step, values | describe(batch))
                if step == last:
                    jax.block_until_ready(state)
                    profile.close()

                ending, best_before = guard.should_stop(step), best
                if run.validation and (step % settings.validation_interval == 0 or step == settings.steps):
                    report.flush()
                    with watch.on("validation"):
                        found = run.validation(state, run.frozen)
                    best = best.after(step, found, settings.best_metric)
                    writer.write_scalars(step, {f"validation_{name}": value for name, value in found.items()})
                is_due = step % settings.checkpoint_interval == 0 or step == settings.steps
                if is_due or ending or best.step != best_before.step or enough():
                    report.flush()
                    writer.flush()
                    with watch.on("checkpoint"):
                        meta = {**run.identity, "best": dataclasses.asdict(best)}
                        checkpoints.save(step, state, run.iterator, meta, best=best.step)
                if ending and step < settings.steps:
                    end = End.PREEMPTED
                    break
        except NonFiniteError as error:
            checkpoints.wait()
            good = f"last good checkpoint: {workdir / CHECKPOINTS / str(checkpoints.newest)}"
            good = good if checkpoints.newest is not None else "no checkpoint yet"
            return Outcome(End.NON_FINITE, error.step, best.step, f"{error}; {good}")
        if end is End.DONE and step < settings.steps:
            end = End.EARLY
        return Outcome(end, step, best.step)


def _mesh_of(config: Config) -> Mesh:
    """The mesh of the experiment over all devices. Raises UserError when they or the batch do not fit it."""
    try:
        mesh = make_mesh(dataclasses.asdict(config.mesh))
    except ValueError as error:
        raise UserError(f"config.{error}; change config.mesh") from error
    rows, parts, shards = (
        config.data.batch_rows,
        config.train.grad_accum_steps,
        math.prod(list(mesh.shape.values())[:2]),
    )
    if rows % (parts * shards) and parts > 1:
        raise UserError(
            f"config.train.grad_accum_steps={parts}: data.batch_rows={rows} must be a multiple of it times the "
            f"mesh's data x fsdp, {shards}"
        )
    return mesh


def _use_compile_cache(folder: str) -> None:
    """Keeps compiled programs in the folder, unless JAX was told of another one already."""
    if folder and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
