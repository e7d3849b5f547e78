"""Training: one function from an experiment to a run's folder.

    outcome = train(config)

`train/setup.py` decides where a run starts. All randomness comes from `seed` and a step's number, so a run that was
stopped anywhere resumes as if it had not been. A step's numbers are fetched while the devices work on the next one, so
that they never wait for the host.
"""

import contextlib
import dataclasses
import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emollama_jax.config import Config, to_dict
from emollama_jax.distributed import PreemptionGuard, barrier, use_compile_cache
from emollama_jax.errors import UserError
from emollama_jax.io.atomic import write_json
from emollama_jax.io.paths import PathLike, as_path
from emollama_jax.io.stopwatch import Stopwatch
from emollama_jax.runs.checkpoint_files import CONFIG
from emollama_jax.runs.checkpoints import Checkpoints
from emollama_jax.sharding import make_mesh, use_mesh
from emollama_jax.train.heartbeat import Heartbeat
from emollama_jax.train.metrics import JsonLines, MultiWriter, Progress, TensorBoard, Writer
from emollama_jax.train.optimizer import make_optimizer
from emollama_jax.train.report import NonFiniteError, NonFinitePolicy, Report, make_describe
from emollama_jax.train.setup import TrainSetup, check_paths, setup_run
from emollama_jax.train.step import make_step, multimodal_loss
from emollama_jax.train.validation import MoreMetrics

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


def train(config: Config, *, more_metrics: MoreMetrics | None = None, heartbeat: PathLike = "") -> Outcome:
    """Trains until `train.steps`, or as long as the validation gets better, or until asked to end.

    Args:
        more_metrics: from the model to further metrics of a validation, such as those of its labels
            (`eval.validation`), which `train.best_metric` may name; called by all processes.
        heartbeat: a file in which the first process tells how far it is (see `train.heartbeat`); "" for none.

    Raises:
        UserError: paths, data, sizes or devices that do not fit, or another run in the folder.
    """
    check_paths(config)
    watch, settings = Stopwatch(), config.train
    workdir, is_first = as_path(settings.workdir), jax.process_index() == 0
    progress = Progress(settings.steps)
    log = progress.log if is_first else lambda message: None
    mesh = make_run_mesh(config)
    use_compile_cache(settings.compile_cache)
    optimizer = make_optimizer(settings)
    with use_mesh(mesh, config.sharding), PreemptionGuard(log) as guard, contextlib.ExitStack() as stack:
        with watch("start"):
            checkpoints = stack.enter_context(Checkpoints(workdir, keep=settings.keep, log=log))
            run = setup_run(config, mesh, checkpoints, optimizer, more_metrics=more_metrics, log=log)
            stack.callback(run.iterator.close)
            if is_first:
                write_json(workdir / CONFIG, to_dict(config))
            files = [JsonLines, TensorBoard] if is_first else []
            writers = [file(workdir, after=run.step) for file in files] + [progress] * is_first
            if heartbeat and is_first:
                writers.append(Heartbeat(as_path(heartbeat), settings.steps, after=run.step))
            writer = MultiWriter(writers)
            stack.callback(writer.close)
        report = Report(config, mesh, writer, watch, run.datasets, run.cost)
        policy = NonFinitePolicy(skip=settings.non_finite == "skip", log=log)
        options = {name: getattr(settings, name) for name in ("grad_accum_steps", "loss_scale")}
        train_step = make_step(run.graphdef, optimizer, multimodal_loss, **options, mesh=mesh)
        loop = _Loop(config, mesh, run, train_step, checkpoints, report, policy, writer, watch)
        try:
            end = loop.run(guard)
        except NonFiniteError as error:
            writer.flush()
            checkpoints.wait()
            newest = checkpoints.newest
            good = "no checkpoint yet" if newest is None else f"last good checkpoint: {checkpoints.folder(newest)}"
            return Outcome(End.NON_FINITE, error.step, loop.best.step, f"{error}; {good}")
        return Outcome(end, loop.step, loop.best.step)


@dataclass
class _Loop:
    """The steps of a run, its validations and its checkpoints."""

    config: Config
    mesh: Mesh
    setup: TrainSetup
    train_step: Callable
    checkpoints: Checkpoints
    report: Report
    policy: NonFinitePolicy
    writer: Writer
    watch: Stopwatch

    def __post_init__(self):
        self.step, self.state, self.best = self.setup.step, self.setup.state, self.setup.best
        self._settings, self._describe = self.config.train, make_describe(self.mesh)
        self._compiled: Callable | None = None
        self._rng = jax.device_put(jax.random.key(self.config.seed), NamedSharding(self.mesh, PartitionSpec()))

    def run(self, guard: PreemptionGuard) -> End:
        """Trains to the end. Raises NonFiniteError where a step that is not finite ends the run."""
        settings = self._settings
        first_profiled, last_profiled = settings.profile or (0, 0)
        with contextlib.ExitStack() as profile:
            while self.step < settings.steps and not self._is_stale():
                self.step += 1
                if self.step == first_profiled:
                    profile.enter_context(jax.profiler.trace(str(self.checkpoints.workdir / PROFILE)))
                self._take_step()
                if self.step == last_profiled:
                    jax.block_until_ready(self.state)
                    profile.close()
                is_asked_to_end = guard.should_stop(self.step)
                is_better = self._validate()
                if self._is_every(settings.checkpoint_interval) or is_asked_to_end or is_better or self._is_stale():
                    self._save()
                if is_asked_to_end and self.step < settings.steps:
                    return End.PREEMPTED
        return End.DONE if self.step >= settings.steps else End.EARLY

    def _take_step(self) -> None:
        with self.watch("data"):
            batch = next(self.setup.iterator)
        arguments = (self.state, self.setup.frozen, batch, self._rng)
        if self._compiled is None:
            with self.watch("compile"):
                self._compiled = self.train_step.lower(*arguments).compile()
                barrier("compiled")
        self.state, values = self._compiled(*arguments)
        self.policy.check(self.report.add(self.step, values | self._describe(batch)))

    def _validate(self) -> bool:
        """Validates where it is due; returns whether it is the best validation so far."""
        if not self.setup.validation or not self._is_every(self._settings.validation_interval):
            return False
        self.policy.check(self.report.flush())
        with self.watch("validation"):
            found = self.setup.validation(self.state, self.setup.frozen)
        self.best = self.best.after(self.step, found, self._settings.best_metric)
        self.writer.write_scalars(self.step, {f"validation_{name}": value for name, value in found.items()})
        return self.best.step == self.step

    def _save(self) -> None:
        """Starts to write a checkpoint. Every step up to it is reported first."""
        self.policy.check(self.report.flush())
        self.writer.flush()
        with self.watch("checkpoint"):
            meta = {**self.setup.meta, "best": dataclasses.asdict(self.best)}
            self.checkpoints.save(self.step, self.state, self.setup.iterator, meta, best=self.best.step)

    def _is_every(self, interval: int) -> bool:
        """Whether something that is done every so many steps, and after the last, is due."""
        return self.step % interval == 0 or self.step == self._settings.steps

    def _is_stale(self) -> bool:
        """Whether the validation has got no better for `train.patience` times."""
        return bool(self._settings.patience) and self.best.worse >= self._settings.patience


def make_run_mesh(config: Config) -> Mesh:
    """The mesh of the experiment over all devices. Raises UserError when they or the batch do not fit it."""
    mesh = make_mesh(dataclasses.asdict(config.mesh))
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
