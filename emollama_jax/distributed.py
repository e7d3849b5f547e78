"""Several processes as one run, and notice that a run is to end.

A run is one process a host. They find each other by flags (`--coordinator HOST:PORT --processes N --process I`), by
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, by Slurm's and GKE's environment, or, with `--pod`, by
whatever JAX finds (Cloud TPU virtual machines, MPI, Kubernetes).
"""

import contextlib
import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from emollama_jax.errors import StartError, UserError, first_line, no_devices
from emollama_jax.io.rendezvous import MissingError, meet

HEARTBEAT_S = 20  # a process that has been silent so long is given up, and the others end
LEAVING_S = 60  # one that ends has to be followed by the others within this
PATIENCE_S = 120  # for the others to be started
CONNECT_S = 60  # for all that have met to be connected
BARRIER_TIMEOUT_S = 1800  # and comes within this to where all wait for all
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # which gRPC would ask for a process of the run
ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class NotStarted(StartError):
    """The processes did not meet."""


@dataclass(frozen=True)
class Group:
    """Which processes make the run: the first one's address, their number and which one this is; or, with an empty
    address, what JAX finds."""

    coordinator: str = ""
    processes: int = 0
    process: int = -1


def find_group(
    coordinator: str | None = None,
    processes: str | None = None,
    process: str | None = None,
    *,
    pod: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> Group | None:
    """The group that flags or the environment name; None for a process on its own.

    Raises:
        UserError: one of the three is missing, or is no number in range.
    """
    given = [coordinator, processes, process]
    where = "--coordinator, --processes and --process"
    if all(value is None for value in given):
        given, where = [environment.get(name) for name in ENVIRONMENT], ", ".join(ENVIRONMENT)
    if any(value is not None for value in given):
        if any(value is None for value in given):
            raise UserError(f"{where}: give all three or none of them")
        address, *numbers = given
        if not (all(number.isdecimal() for number in numbers) and int(numbers[1]) < int(numbers[0])):
            raise UserError(f"{where}: process {numbers[1]} of {numbers[0]}; count them from 0")
        return Group(address, int(numbers[0]), int(numbers[1])) if int(numbers[0]) > 1 else None
    slurm = int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    gke = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    return Group() if pod or slurm or gke else None


@contextlib.contextmanager
def process_group(
    group: Group | None, *, patience_s: int | float = PATIENCE_S, log: Callable[[str], None] = lambda line: None
) -> Iterator[None]:
    """Within the block this process is one of the group. To be entered before JAX touches a device.

    Args:
        patience_s: how long the others may take to come.
        log: is told what is waited for.

    Raises:
        StartError: the others do not come or cannot be found, or the devices are not there.
    """
    if group is None:
        _check_devices()
        yield
        return
    named = (
        {"coordinator_address": group.coordinator, "num_processes": group.processes, "process_id": group.process}
        if group.coordinator
        else {}  # what JAX finds itself also says which devices are this process's
    )
    try:
        found = group if group.coordinator else _find_by_jax(patience_s)
        if found.processes > 1:  # JAX ends the process where one is missing
            meet(found.coordinator, found.processes, found.process, patience_s, log)
        with _without_proxies():
            jax.distributed.initialize(
                **named,
                initialization_timeout=CONNECT_S if found.processes else math.ceil(patience_s),
                heartbeat_timeout_seconds=HEARTBEAT_S,
                shutdown_timeout_seconds=LEAVING_S,
            )
    except (MissingError, RuntimeError, ValueError) as error:
        raise NotStarted(
            f"the processes of the run did not meet ({first_line(error)}); check that all were started, with the same "
            "address, or give them more time with --wait"
        ) from error
    _check_devices()
    yield
    jax.distributed.shutdown()


def _find_by_jax(patience_s: int | float) -> Group:
    """The group that JAX finds in the environment of Slurm, MPI, Kubernetes or Cloud TPU; an empty one where it finds
    none, or does not say. JAX tells it to nobody before it waits for the others.

    Args:
        patience_s: for the first process's address to be known.
    """
    try:
        from jax._src.clusters import ClusterEnv

        detect = ClusterEnv.auto_detect_unset_distributed_params
    except (ImportError, AttributeError):  # it is private to JAX, which then waits itself
        return Group()
    unset = dict.fromkeys(
        ("coordinator_address", "num_processes", "process_id", "local_device_ids", "cluster_detection_method")
    )
    address, processes, process, _ = detect(**unset, initialization_timeout=math.ceil(patience_s))
    return Group() if None in (address, processes, process) else Group(address, processes, process)


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """Within the block gRPC goes to the processes of the run itself, whatever proxy is set for others."""
    kept = {name: os.environ.pop(name) for name in PROXIES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _check_devices() -> None:
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise no_devices(error) from error


def use_compile_cache(folder: str) -> None:
    """Keeps compiled programs in a folder for later starts, unless JAX was told of another one; "" keeps none."""
    if folder and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))


def barrier(where: str, timeout_s: int = BARRIER_TIMEOUT_S) -> None:
    """Waits for the other processes, so that none gives up one that is slower to load, to compile or to work."""
    ocp.multihost.get_barrier_sync_fn()(key=f"emollama/{where}", timeout_ms=1000 * timeout_s)


class PreemptionGuard:
    """SIGTERM and SIGINT (Ctrl-C) as notice that the run is to save and end: on a machine that is taken away, or by
    hand. A second SIGINT interrupts.

    Of several processes one that gets it is enough; all end after the same step.
    """

    def __init__(self, log: Callable[[str], None] = lambda line: None):
        """`log` is told that notice was given."""
        self._given, self._log = False, log

    def __enter__(self) -> "PreemptionGuard":
        # Of several processes, JAX listens for SIGTERM and agrees on the step.
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,)
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        self._given = True
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
            with contextlib.suppress(RuntimeError):  # the signal came within another line
                self._log("asked to end: saves after this step; Ctrl-C again ends at once, without saving")
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)

    def should_stop(self, step: int) -> bool:
        """Whether to end after this step. To be asked once for every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._given
