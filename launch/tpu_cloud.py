"""What `tpu.py` asks of Google Cloud: queued resources, their virtual machines, and objects of a bucket, by gcloud."""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpu_types import Slice, parse_type

HERE = Path(__file__).resolve().parent
STARTUP = HERE / "tpu_startup.sh"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"


class CloudError(Exception):
    """A command of gcloud failed; the message is the line in which it says why."""


@dataclass(frozen=True)
class Launch:
    """What is launched. `to_json` of it lies in the job's folder, where later commands read it."""

    name: str
    zone: str
    bucket: str
    type: str = ""
    slices: int = 1
    project: str = ""
    capacity: str = "spot"
    network: str = ""
    service_account: str = ""
    internal_ips: bool = False
    extras: str = "tpu,gcs"
    env: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()

    @property
    def slice(self) -> Slice:
        return parse_type(self.type)

    @property
    def chips(self) -> int:
        return self.slices * self.slice.chips

    @property
    def job(self) -> str:
        """The folder of the job in the bucket."""
        return f"{self.bucket.rstrip('/')}/jobs/{self.name}"

    @property
    def nodes(self) -> list[str]:
        """Cloud TPU's names of the slices."""
        return [self.name] if self.slices == 1 else [f"{self.name}-{i}" for i in range(self.slices)]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Launch":
        return cls(**{name: tuple(x) if name == "command" else x for name, x in json.loads(text).items()})


class Cloud:
    """Runs gcloud; with `dry_run` prints the commands instead, as for a launch that is not there yet."""

    def __init__(self, launch: Launch, *, dry_run: bool = False):
        self.launch, self._dry_run = launch, dry_run

    def run(self, *command: str, text: str | None = None, to_terminal: bool = False) -> str:
        """Runs a command and returns what it prints.

        Args:
            text: its standard input.
            to_terminal: its output goes to this process's own.

        Raises:
            CloudError: it fails, or is not there.
        """
        if self._dry_run:
            print(shlex.join(command), flush=True)
            return ""
        pipe = None if to_terminal else subprocess.PIPE
        try:
            done = subprocess.run(command, input=text, stdout=pipe, stderr=pipe, text=True)
        except FileNotFoundError as error:
            raise CloudError(f"{command[0]} is not installed, or not on the PATH") from error
        if done.returncode:
            lines = [line for line in (done.stderr or "").splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:]
            raise CloudError(
                errors[0].removeprefix("ERROR: ") if errors else f"{command[0]} ended with exit code {done.returncode}"
            )
        return done.stdout or ""

    # Queued resources

    def find(self) -> dict[str, Any] | None:
        """Returns Cloud TPU's description of the queued resource; None where there is none."""
        try:
            return json.loads(self.run(*self._queued("describe"), "--format=json") or "null")
        except CloudError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise

    def create(self) -> None:
        """Asks for the slices, without waiting for them."""
        launch, slice_ = self.launch, self.launch.slice
        nodes = (
            [f"--node-id={launch.name}"]
            if launch.slices == 1
            else [f"--node-count={launch.slices}", f"--node-prefix={launch.name}"]
        )
        options = {"network": launch.network, "service-account": launch.service_account, "scopes": SCOPE}
        self.run(
            *self._queued("create"),
            *nodes,
            f"--accelerator-type={slice_.accelerator_type}",
            f"--runtime-version={slice_.kind.runtime}",
            f"--metadata=emollama-job={launch.job}",
            f"--metadata-from-file=startup-script={STARTUP}",
            *(f"--{name}={value}" for name, value in options.items() if value),
            *(["--internal-ips"] if launch.internal_ips else []),
            *([] if launch.capacity == "on-demand" else [f"--{launch.capacity}"]),
            "--async",
            "--quiet",
        )

    def delete(self) -> bool:
        """Deletes the slices and what was queued, whatever state it is in; False where there was nothing."""
        try:
            self.run(*self._queued("delete"), "--force", "--quiet")
        except CloudError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return False
        return True

    def _queued(self, verb: str) -> list[str]:
        command = ["gcloud", "compute", "tpus", "queued-resources", verb, self.launch.name]
        return [*command, f"--zone={self.launch.zone}", *self._project()]

    def _project(self) -> list[str]:
        return [f"--project={self.launch.project}"] if self.launch.project else []

    # Virtual machines

    def ssh(self, node: str, worker: str = "all", command: str = "") -> str:
        """Runs a command on one virtual machine of a slice or all of them; without one, opens a shell on one."""
        launch = self.launch
        return self.run(
            *("gcloud", "compute", "tpus", "tpu-vm", "ssh", node),
            *(f"--zone={launch.zone}", *self._project(), f"--worker={worker}"),
            *([f"--command={command}"] if command else []),
            *(["--internal-ip"] if launch.internal_ips else []),
            "--quiet",
            to_terminal=not command,
        )

    def ssh_everywhere(self, command: str) -> None:
        for node in self.launch.nodes:
            self.ssh(node, command=command)

    # The job's folder in the bucket

    def read(self, name: str) -> str:
        """Returns the objects of a name, which may have wildcards, one after another. Raises CloudError for none."""
        return self.run("gcloud", "storage", "cat", f"{self.launch.job}/{name}")

    def write(self, name: str, text: str) -> None:
        self.run("gcloud", "storage", "cp", "-", f"{self.launch.job}/{name}", "--quiet", text=text)

    def upload(self, files: Sequence[str]) -> None:
        self.run("gcloud", "storage", "cp", *files, f"{self.launch.job}/", "--quiet")

    def forget(self, name: str) -> None:
        """Removes objects, if there are any."""
        try:
            self.run("gcloud", "storage", "rm", f"{self.launch.job}/{name}", "--quiet")
        except CloudError as error:
            if "matched no objects" not in str(error):
                raise


def build_wheel(cloud: Cloud, repository: Path, folder: Path) -> Path:
    """Builds the package's wheel in a folder, out of a copy: setuptools would leave files in the repository, and put
    modules that are gone from it into the next wheel."""
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(repository / name, source)
    for name in ("emollama_jax", "configs"):
        shutil.copytree(repository / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    cloud.run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={folder}", str(source))
    return next(folder.glob("emollama_jax-*.whl"), folder / "emollama_jax-VERSION-py3-none-any.whl")
