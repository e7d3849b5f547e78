"""Compiles programs in subprocesses, several at a time, and caches their figures."""

import concurrent.futures
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from emollama_jax.config import Config, to_dict
from emollama_jax.errors import UserError
from emollama_jax.io.atomic import write_json
from emollama_jax.plan.topology import Topology

PACKAGES = ("jax", "jaxlib", "flax", "optax", "qwix", "libtpu", "jax-cuda12-plugin")
SOURCES = (  # the modules that the programs and their figures depend on
    *("models", "train", "infer", "features", "sharding.py", "config.py"),
    *(f"data/{name}.py" for name in ("batch", "datasets")),
    *(f"plan/{name}.py" for name in ("programs", "worker", "hlo", "topology")),
)
QUIET = {  # asks no cloud's metadata server, and claims no TPU of this machine
    "TPU_SKIP_MDS_QUERY": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Job:
    """A program to compile, with the rows of its whole batch."""

    config: Config
    topology: Topology
    program: str
    rows: int


@dataclass(frozen=True)
class Compiler:
    """Compiles jobs.

    Attributes:
        cache: folder of earlier results, keyed by all that they depend on; None caches nothing.
        processes: how many programs compile at a time.
        deadline: on the clock of `time.monotonic`; after it no compile starts and running ones are stopped. None waits.
    """

    cache: Path | None = None
    processes: int = 1
    deadline: float | None = None

    def within(self, seconds: float) -> "Compiler":
        """The same compiler with a deadline so many seconds from now."""
        return replace(self, deadline=time.monotonic() + seconds)

    def compile(self, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
        """Yields the figures of each job in order, as `worker.compile_program` returns them, or one line of `error`."""
        stop = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(self.processes) as pool:
            try:
                yield from pool.map(lambda job: self._one(job, stop), jobs)
            except BaseException:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _one(self, job: Job, stop: threading.Event) -> dict[str, Any]:
        request = {
            "config": to_dict(job.config),
            "topology": job.topology.name,
            "program": job.program,
            "rows": job.rows,
        }
        kept = self.cache and self.cache / f"{_key(request)}.json"
        if kept and kept.exists():
            return {**json.loads(kept.read_text()), "cached": True}
        found = self._run(request, stop)
        if kept and "error" not in found:
            write_json(kept, found)
        return {**found, "cached": False}

    def _run(self, request: dict[str, Any], stop: threading.Event) -> dict[str, Any]:
        what = f"{request['program']} on {request['topology']}"
        if self._left() is not None and self._left() <= 0:
            return {"error": f"{what}: not compiled, the time was over; give a longer --time-limit"}
        with tempfile.TemporaryDirectory(prefix="emollama-plan-") as folder:
            asked, result, log = (Path(folder) / name for name in ("request", "result", "log"))
            asked.write_text(json.dumps(request))
            environment = {**os.environ, **QUIET, "TPU_LOG_DIR": "disabled"}
            with log.open("w") as out:
                child = subprocess.Popen(
                    [sys.executable, "-m", "emollama_jax.plan.worker", str(asked), str(result)],
                    env=environment,
                    stdout=out,
                    stderr=out,
                )
                try:
                    while child.poll() is None and not stop.is_set() and (self._left() is None or self._left() > 0):
                        time.sleep(0.1)
                finally:
                    if ended := child.poll() is None:
                        child.kill()
                    child.wait()
            if result.exists():
                return json.loads(result.read_text())
            if ended:
                return {"error": f"{what}: not compiled in time; give a longer --time-limit"}
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            last = lines[-1][:200] if lines else "no message"
            return {
                "error": f"{what}: the compiler died with code {child.returncode} ({last}); it takes about 3 GiB of "
                "memory each, so try --processes 1"
            }

    def _left(self) -> float | None:
        return None if self.deadline is None else self.deadline - time.monotonic()


def figures(compiler: Compiler, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """The figures of all jobs. Raises UserError for the first that cannot be compiled."""
    found = list(compiler.compile(jobs))
    for one in found:
        if "error" in one:
            raise UserError(one["error"])
    return found


def _key(request: dict[str, Any]) -> str:
    """The cache key of a result: a digest of the request, the packages' versions and our sources."""
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode())
    for package in PACKAGES:
        try:
            digest.update(f"{package} {metadata.version(package)}\n".encode())
        except metadata.PackageNotFoundError:
            digest.update(f"{package} -\n".encode())
    root = Path(__file__).parents[1]
    for source in SOURCES:
        path = root / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:32]
