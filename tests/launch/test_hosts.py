"""A whole launch for real, but for the cloud: `tpu.py`, the startup script and its unit on two hosts in containers that
boot by systemd, a real gcloud beside a bucket server, the package installed from the bucket."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.hosts import Host, Metadata, why_not
from tests.train.runs import ROOT, arguments, assert_same_run, lines, make_inputs
from tests.train.test_bucket import SERVER_VARIABLES, address, download, stored, upload  # noqa: F401
from tests.train.test_bucket import pytestmark as needs_bucket

WHY_NOT = why_not() or ("" if os.environ.get("EMOLLAMA_HOSTS") else "a quarter of an hour: EMOLLAMA_HOSTS=1 adds it")
pytestmark = [pytest.mark.slow, needs_bucket, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")]
BASE = ["--name=stage1", "--zone=z", "--bucket=gs://runs"]
STEPS = 90
FIELDS = {"train__steps": STEPS, "train__checkpoint_interval": 10, "mesh__fsdp": 2}


class Cloud:
    """Two hosts, which `tpu.py` starts."""

    def __init__(self, folder: Path, bucket: str):
        self.folder, self.bucket = folder, bucket
        self.hosts = [Host(folder / "hosts", name) for name in ("host0", "host1")]
        google = {
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE": f"{bucket}/storage/v1/",
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
            "CLOUDSDK_CORE_PROJECT": "test",
            "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
        }
        attributes = {
            "emollama-job": "gs://runs/jobs/stage1",
            "startup-script": (ROOT / "launch/tpu_startup.sh").read_text(),
            "worker-network-endpoints": "unknown:unknown:127.0.0.1,unknown:unknown:127.0.0.1",
        }
        self.servers = [Metadata(attributes | {"agent-worker-number": str(i)}) for i in range(2)]
        shared = google | {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_CERT"))}
        shared |= dict.fromkeys(SERVER_VARIABLES, bucket)
        hosts = {
            h.name: shared | {"GCE_METADATA_HOST": s.address} for h, s in zip(self.hosts, self.servers, strict=True)
        }
        real = subprocess.run(["which", "gcloud"], capture_output=True, text=True).stdout.strip()
        (folder / "bin").mkdir(parents=True)
        (folder / "cloud.json").write_text(json.dumps({"hosts": hosts, "storage": google, "gcloud": real}))
        fake = Path(__file__).parent / "sandbox_gcloud.py"
        (folder / "bin/gcloud").write_text(f'#!/bin/sh\nexec {sys.executable} {fake} "$@"\n')
        (folder / "bin/gcloud").chmod(0o755)

    def start(self, verb: str, *arguments: str) -> subprocess.Popen:
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        with (self.folder / "transcript").open("a") as transcript:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "launch/tpu.py"), verb, *BASE, *arguments],
                env=os.environ | {"SANDBOX": str(self.folder), "PATH": path},
                stdout=transcript,
                stderr=transcript,
            )
            return self.process

    def run(self, verb: str, *arguments: str, timeout: float = 60) -> int:
        return self.start(verb, *arguments).wait(timeout=timeout)

    def step(self) -> int:
        try:
            return json.loads(stored(self.bucket, "jobs/stage1/state/heartbeat.json"))["step"]
        except OSError:
            return -1

    def has(self, name: str) -> bool:
        try:
            return bool(stored(self.bucket, name))
        except OSError:
            return False

    def said(self) -> str:
        logs = [host.folder / "root/var/log/emollama.log" for host in self.hosts]
        ends = [f"== {log}\n{log.read_text()[-3000:]}" for log in logs if log.exists()]
        return "\n".join([(self.folder / "transcript").read_text(), *ends])

    def wait(self, is_so, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.5)

    def close(self) -> None:
        self.process.kill()
        for host in self.hosts:
            host.end()
        for server in self.servers:
            server.close()


@pytest.fixture
def cloud(tmp_path, address):  # noqa: F811
    made = Cloud(tmp_path / "cloud", address)
    yield made
    made.close()


def test_killed_stalled_and_taken_away_a_run_ends_as_if_it_had_not_been(cloud, tmp_path):
    inputs = make_inputs(tmp_path)
    upload(cloud.bucket, inputs / "base", "base")
    upload(cloud.bucket, inputs / "clips", "clips")
    there = {"data__train": "gs://runs/clips:train", "weights__base": "gs://runs/base"}
    start = ["--type=v5e-8", "--extras=gcs", "--poll=2", "--env=JAX_PLATFORMS=cpu"]

    def train(workdir: str) -> list[str]:
        return ["--", "emollama", "train", *arguments(inputs, Path("x"), **FIELDS, **there, train__workdir=workdir)]

    # Installed from the bucket on both, and not disturbed.
    assert cloud.run("run", *start, *train("gs://runs/unbroken"), timeout=1500) == 0, cloud.said()

    watch = cloud.start("run", *start, "--stall-minutes=4", *train("gs://runs/run"))
    cloud.wait(lambda: cloud.has("run/config.json") and cloud.step() >= 12, 600)
    cloud.hosts[1].signal_run(signal.SIGKILL)
    cloud.wait(lambda: cloud.step() >= 35, 400)
    stalls = lambda: (cloud.folder / "transcript").read_text().count("STALLED")
    before = stalls()  # a slow machine may take as long to start again
    cloud.hosts[0].signal_run(signal.SIGSTOP)
    cloud.wait(lambda: stalls() > before, 600)
    cloud.wait(lambda: cloud.step() >= 60, 600)
    (cloud.folder / "lost").touch()
    assert watch.wait(timeout=1500) == 0, cloud.said()

    said = (cloud.folder / "transcript").read_text()
    assert said.count("DONE") == 2 and said.count("SUSPENDED") == 1
    run, unbroken = (download(cloud.bucket, name, tmp_path / "back") for name in ("run", "unbroken"))
    assert_same_run(run, unbroken)
    assert len(lines(run)) == STEPS
    log = stored(cloud.bucket, "jobs/stage1/logs/process-0.log")
    assert "resumed from step" in log and "ok    devices: 2 x cpu" in log
    assert cloud.run("down") == 0
    assert not any(host.is_up for host in cloud.hosts)
