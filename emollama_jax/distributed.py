"""Several processes as one run, and notice that a run is to end.

A run is one process a host. They find each other by flags (`--coordinator HOST:PORT --processes N --process I`), by
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, by Slurm's and GKE's environment, or, with `--pod`, by
whatever JAX finds (Cloud TPU virtual machines, MPI, Kubernetes).
"""

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from emollama_jax.errors import UserError, first_line

HEARTBEAT_S = 20  # a process that has been silent so long is given up, and the others end
LEAVING_S = 60  # one that ends has to be followed by the others within this
BARRIER_TIMEOUT_S = 1800  # and comes within this to where all wait for all
ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class NotStarted(UserError):
    """The processes did not meet, or the devices are not there."""

    exit_code = 3


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
def process_group(group: Group | None) -> Iterator[None]:
    """Within the block this process is one of the group. To be entered before JAX touches a device.

    Raises:
        NotStarted: the others do not come or cannot be found, or the devices are not there.
    """
    if group is None:
        _check_devices()
        yield
        return
    found = (
        {"coordinator_address": group.coordinator, "num_processes": group.processes, "process_id": group.process}
        if group.coordinator
        else {}
    )
    try:
        jax.distributed.initialize(**found, heartbeat_timeout_seconds=HEARTBEAT_S, shutdown_timeout_seconds=LEAVING_S)
    except (RuntimeError, ValueError) as error:
        raise NotStarted(
            f"the processes of the run did not meet ({first_line(error)}); check that all were started"
        ) from error
    _check_devices()
    yield
    jax.distributed.shutdown()


def _check_devices() -> None:
    try:
        jax.devices()
    except RuntimeError as error:
        raise NotStarted(f"no devices ({first_line(error)}); JAX_PLATFORMS=cpu runs on the processor") from error


def use_compile_cache(folder: str) -> None:
    """Keeps compiled programs in a folder for later starts, unless JAX was told of another one; "" keeps none."""
    if folder and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))


def barrier(where: str, timeout_s: int = BARRIER_TIMEOUT_S) -> None:
    """Waits for the other processes, so that none gives up one that is slower to load, to compile or to work."""
    ocp.multihost.get_barrier_sync_fn()(key=f"emollama/{where}", timeout_ms=1000 * timeout_s)


class PreemptionGuard:
    """SIGTERM as notice that the run is to save and end: on a machine that is taken away, or by hand.

    Of several processes one that gets it is enough; all end after the same step.
    """

    def __init__(self):
        self._given = False

    def __enter__(self) -> "PreemptionGuard":
        if jax.process_count() == 1:  # of several, JAX listens and agrees on the step
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._before)

    def _receive(self, number: int, frame: object) -> None:
        self._given = True

    def should_stop(self, step: int) -> bool:
        """Whether to end after this step. To be asked once for every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._given
