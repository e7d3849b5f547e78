"""Checks of a host, or of all hosts of a pod together, before a run: what would otherwise end it late, or hang it.

with process_group(group):
    for check in check_hosts(config):
        print(check)
"""

import contextlib
import hashlib
import json
import os
import platform
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from emollama_jax import __version__
from emollama_jax.config import Config, to_dict
from emollama_jax.data.batch_shards import process_rows
from emollama_jax.data.datasets import find_images, open_datasets
from emollama_jax.distributed import barrier
from emollama_jax.errors import UserError, as_user_error
from emollama_jax.io.paths import as_path, is_remote
from emollama_jax.train.loop import make_run_mesh
from emollama_jax.train.setup import check_paths

GIB = 2**30
DISK_GIB, MEMORY_GIB, SHM_GIB = 5, 4, 1  # to be free
SKEW_MS = 5000  # between two hosts' clocks
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "orbax-checkpoint", "grain", "gcsfs")
PROBE = "doctor-probe"  # in the run's folder, while it is checked


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what was found, or what is wrong with it and the remedy."""

    name: str
    found: str = ""
    problem: str = ""

    def __str__(self) -> str:
        return f"{'wrong' if self.problem else 'ok   '} {self.name}: {self.problem or self.found}"


def check_hosts(config: Config | None) -> Iterator[Check]:
    """Yields the checks of this host and, of several processes, of all hosts; to be called by all of them.

    Args:
        config: of the run; without one only what does not depend on it is checked.
    """
    problems = 0
    for check in _all_checks(config):
        problems += bool(check.problem)
        yield check
    found = _exchange(np.asarray([problems], np.int32))[:, 0]
    if others := [str(i) for i, count in enumerate(found) if count and i != jax.process_index()]:
        yield Check("other hosts", problem=f"process {', '.join(others)} found what is wrong; see its output")


def _all_checks(config: Config | None) -> Iterator[Check]:
    yield Check("versions", _versions())
    yield Check("devices", _devices())
    yield _disk(config)
    yield _memory()
    yield _shared_memory(config)
    yield from _same_everywhere(config)
    yield _clocks()
    if config is not None:
        yield _attempt("mesh", lambda: _mesh(config))
        yield _attempt("data.train", lambda: _data(config))
        yield _attempt("weights", lambda: _weights(config))
        yield from _workdir(config)


def _attempt(name: str, look: Callable[[], str]) -> Check:
    """The check that finds what `look` returns, or the error that a user can mend."""
    try:
        return Check(name, look())
    except Exception as error:
        known = as_user_error(error)
        problem = str(known).removeprefix(f"{name}: ") if known else f"{type(error).__name__}: {error}"
        return Check(name, problem=problem)


def _versions() -> str:
    found = [f"python {platform.python_version()}", f"emollama_jax {__version__}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except ImportError:  # not installed
            continue
    return ", ".join(found)


def _devices() -> str:
    local, kind = jax.local_devices(), jax.local_devices()[0].device_kind
    memory = (local[0].memory_stats() or {}).get("bytes_limit")
    each = f", {memory / GIB:.1f} GiB each" if memory else ""
    where = f"process {jax.process_index()} of {jax.process_count()}"
    return f"{jax.device_count()} x {kind}{each}, {len(local)} of them in {where}"


def _disk(config: Config | None) -> Check:
    folders = {Path(tempfile.gettempdir())}
    if config is not None and config.train.workdir and not is_remote(config.train.workdir):
        workdir = Path(as_path(config.train.workdir))
        folders.add(next(folder for folder in (workdir, *workdir.parents) if folder.exists()))
    free = {folder: shutil.disk_usage(folder).free / GIB for folder in sorted(folders)}
    if low := [f"{folder}: {gib:.1f} GiB" for folder, gib in free.items() if gib < DISK_GIB]:
        return Check("disk", problem=f"less than {DISK_GIB} GiB free: {', '.join(low)}; make room there")
    return Check("disk", ", ".join(f"{gib:.0f} GiB free at {folder}" for folder, gib in free.items()))


def _memory() -> Check:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        gib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024 / GIB
    except (OSError, StopIteration):
        return Check("memory", "not known here")
    if gib < MEMORY_GIB:
        return Check("memory", problem=f"{gib:.1f} GiB available, less than {MEMORY_GIB}; end what else runs here")
    return Check("memory", f"{gib:.0f} GiB available")


def _shared_memory(config: Config | None) -> Check:
    """Reading processes hand clips over in /dev/shm, which containers make 64 MB small."""
    if not os.path.isdir("/dev/shm"):
        return Check("/dev/shm", "none here")
    gib = shutil.disk_usage("/dev/shm").free / GIB
    if config is not None and config.data.workers and gib < SHM_GIB:
        remedy = "mount a larger one, or take data.workers=0"
        return Check("/dev/shm", problem=f"{gib:.2f} GiB free, data.workers need {SHM_GIB}; {remedy}")
    return Check("/dev/shm", f"{gib:.2f} GiB free")


def _same_everywhere(config: Config | None) -> Iterator[Check]:
    """Whether all hosts run the same code and experiment: others compile other programs, and wait for ever."""
    package = Path(__file__).parents[1]
    files = sorted(package.rglob("*.py"), key=lambda file: file.relative_to(package).as_posix())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(package).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    hashes = {"code": digest.hexdigest()}
    if config is not None:
        hashes["config"] = hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()
    for name, value in hashes.items():
        found = _exchange(np.frombuffer(bytes.fromhex(value[:16]), np.int32))
        others = [str(i) for i in range(len(found)) if (found[i] != found[0]).any()]
        if others:
            yield Check(name, problem=f"process {', '.join(others)} has another one than process 0; install it anew")
        else:
            yield Check(name, f"sha256 {value[:16]}" + (" on every host" if len(found) > 1 else ""))


def _clocks() -> Check:
    barrier("doctor")
    seconds, fraction = divmod(time.time(), 1)
    found = _exchange(np.asarray([int(seconds), int(1000 * fraction)], np.int32)).astype(np.int64)
    if len(found) == 1:
        return Check("clock", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))
    skew = np.abs((found - found[0]) @ [1000, 1])
    if skew.max() > SKEW_MS:
        who = ", ".join(str(i) for i in np.flatnonzero(skew > SKEW_MS))
        return Check("clock", problem=f"that of process {who} is {skew.max() / 1000:.0f} s off; start its time service")
    return Check("clock", f"hosts differ by at most {skew.max()} ms")


def _exchange(values: np.ndarray) -> np.ndarray:
    """Returns the values of every process, int32 [P, N] of int32 [N]."""
    if jax.process_count() == 1:
        return values[None]
    return np.asarray(multihost_utils.process_allgather(values))


def _mesh(config: Config) -> str:
    mesh = make_run_mesh(config)
    rows = process_rows(config, mesh, None)
    sizes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"{sizes}, a batch has {config.data.batch_rows} rows, parts: {rows.num_parts}"


def _data(config: Config) -> str:
    datasets = open_datasets(config.data.train, config, "data.train")
    return f"{sum(map(len, datasets)):,} clips in {len(datasets)} data sets"


def _weights(config: Config) -> str:
    """Looks for the files that training reads; `weights.trained` only a new run needs."""
    check_paths(config)
    settings, files = config.weights, [config.weights.trained]
    if find_images(open_datasets(config.data.train, config, "data.train")) == "frames":
        files += [settings.eva_vit, settings.ln_vision]
        if missing := [file for file in files[1:] if file and not as_path(file).exists()]:
            raise UserError(
                f"weights.eva_vit, weights.ln_vision: no such file: {', '.join(missing)}; see docs/weights.md"
            )
    there = [file for file in files if file and as_path(file).exists()]
    missing = [f"without {file}" for file in files if file and file not in there]
    return ", ".join([settings.base, *there, *missing])


def _workdir(config: Config) -> Iterator[Check]:
    """Whether the run's folder can be written, and is the same one for all processes."""
    if not config.train.workdir:
        return
    folder = as_path(config.train.workdir)
    new = [] if is_remote(folder) else [place for place in (folder, *folder.parents) if not place.exists()]
    token = _exchange(np.asarray([secrets.randbits(30)], np.int32))[0, 0]
    is_first, probe = jax.process_index() == 0, folder / PROBE
    check = _attempt("train.workdir", lambda: _write(probe, str(token))) if is_first else None
    barrier("doctor-written")
    if check is None or not check.problem:
        check = _attempt("train.workdir", probe.read_text)
        if check.found != str(token):
            why = check.problem or "another one than that of process 0"
            check = Check(
                "train.workdir", problem=f"{folder}: {why}; take a folder that all hosts share, such as gs://BUCKET/RUN"
            )
        else:
            check = Check("train.workdir", f"{folder}: written and read")
    barrier("doctor-read")
    if is_first:
        with contextlib.suppress(OSError):  # it was not written
            probe.unlink()
        for place in new:
            if place.is_dir() and not list(place.iterdir()):
                place.rmdir()
    yield check


def _write(probe: epath.Path, token: str) -> str:
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.write_text(token)
    return token
