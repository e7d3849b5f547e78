"""What a notebook's machine has, and what a model needs, before anything is downloaded."""

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from emollama_jax.errors import UserError

OLDEST = (3, 11)  # Python
MEMINFO = Path("/proc/meminfo")
TPUS = ("/dev/accel0", "/dev/vfio/0")


@dataclass(frozen=True)
class Machine:
    """What there is; memory and disk in GB (10^9 bytes).

    Attributes:
        device: "cpu", "gpu" or "tpu".
        name: of the device.
        device_gb: memory of a GPU; 0 where it is not known.
        host_gb: memory that is free for programs.
        disk_gb: free where the work is done.
        python: the kernel's version.
    """

    device: str
    name: str
    device_gb: float
    host_gb: float
    disk_gb: float
    python: tuple[int, int]

    @property
    def extra(self) -> str:
        """The extra of the package that brings JAX for the device; "" for the processor."""
        return {"gpu": "cuda", "tpu": "tpu"}.get(self.device, "")


@dataclass(frozen=True)
class Needs:
    """What a model needs, in GB; see `Machine`."""

    what: str
    devices: Sequence[str]
    device_gb: float
    host_gb: float
    disk_gb: float


NEEDS = {
    "small": Needs("SmolLM2-135M with small untrained encoders", ("cpu", "gpu", "tpu"), 0.0, 3.0, 4.0),
    # Disk: 20 GB of weights, 7 of the int8 copy before the download goes, and the environment.
    "7B": Needs("Emotion-LLaMA 7B, int8", ("gpu", "tpu"), 15.0, 8.0, 38.0),
}


@dataclass(frozen=True)
class MachineCheck:
    """A machine beside what a model needs; shown as a table."""

    machine: Machine
    rows: Sequence[tuple[str, str, str]]
    """What, what there is, and advice; "" where it is enough."""

    @property
    def extra(self) -> str:
        return self.machine.extra

    def _repr_html_(self) -> str:
        lines = []
        for what, found, advice in self.rows:
            mark = f"<b>{escape(advice)}</b>" if advice else "&#10003;"
            lines.append(f'<tr><td>{escape(what)}</td><td style="text-align:left">{escape(found)}</td>')
            lines.append(f'<td style="text-align:left">{mark}</td></tr>')
        return f"<table>{''.join(lines)}</table>"


def check_machine(model: str, *, folder: str | Path = ".", machine: Machine | None = None) -> MachineCheck:
    """Show whether this machine can run a model, and return what it is.

    Args:
        model: "small" or "7B".
        folder: where the work is done.
        machine: default: this one.

    Raises:
        UserError: it cannot; the line says what to change.
    """
    if model not in NEEDS:
        raise UserError(f"no model {model!r}; give one of {', '.join(NEEDS)}")
    from IPython.display import display

    check = compare(machine or find_machine(folder), NEEDS[model])
    display(check)
    if advice := [advice for *_, advice in check.rows if advice]:
        raise UserError(f"{model} cannot run here: {'; '.join(advice)}")
    return check


def compare(machine: Machine, needs: Needs) -> MachineCheck:
    """Compare a machine with what a model needs."""
    has_device = machine.device in needs.devices
    enough = has_device and (machine.device != "gpu" or machine.device_gb >= needs.device_gb)
    change = f"Runtime > Change runtime type: T4 GPU or v5e-1 TPU, {needs.device_gb:g} GB" if not enough else ""
    memory = f" with {machine.device_gb:.1f} GB" if machine.device_gb else ""
    python, oldest = (".".join(map(str, version)) for version in (machine.python, OLDEST))
    short = lambda have, need, remedy: "" if have >= need else f"needs {need:g} GB: {remedy}"
    rows = (
        ("model", needs.what, ""),
        ("device", f"{machine.name}{memory}", change),
        ("memory", f"{machine.host_gb:.1f} GB free", short(machine.host_gb, needs.host_gb, "restart the runtime")),
        ("disk", f"{machine.disk_gb:.0f} GB free", short(machine.disk_gb, needs.disk_gb, "remove files or take a GPU")),
        ("kernel", f"Python {python}", "" if machine.python >= OLDEST else f"needs Python {oldest} or newer"),
    )
    return MachineCheck(machine, rows)


def find_machine(folder: str | Path = ".") -> Machine:
    """Look at this machine, without JAX."""
    device, name, device_gb = _device()
    version = tuple(map(int, platform.python_version_tuple()[:2]))
    return Machine(device, name, device_gb, _free_memory(), shutil.disk_usage(folder).free / 1e9, version)


def _device() -> tuple[str, str, float]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    if done and not done.returncode and done.stdout.strip():
        name, _, mebibytes = done.stdout.splitlines()[0].rpartition(",")
        return "gpu", name.strip(), int(mebibytes) * 2**20 / 1e9
    if any(Path(path).exists() for path in TPUS):
        return "tpu", f"TPU {os.environ.get('TPU_ACCELERATOR_TYPE', '')}".strip(), 0.0
    return "cpu", f"no accelerator, {os.cpu_count()} processors", 0.0


def _free_memory() -> float:
    """Of the host, in GB; infinity where it is not known."""
    try:
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024 / 1e9
    except (OSError, KeyError, ValueError):
        return float("inf")
