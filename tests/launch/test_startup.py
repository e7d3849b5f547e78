"""The startup script of TPU machines: what it makes of their metadata, and when it refuses to begin."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.launch.cloud import ROOT

TWO_SLICES = """ACCELERATOR_TYPE: 'v5litepod-16'
MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9:8080'
MEGASCALE_NUM_SLICES: '2'
MEGASCALE_SLICE_ID: '1'
"""


def start(
    folder: Path, *, needs: int = 99999, broken: str = "", **attributes: str
) -> tuple[int, dict[str, str], list[dict]]:
    """Runs the script with a machine's attributes, in a folder. Returns its exit code, the run's environment, and what
    it told the bucket.

    `needs` gigabytes of disk; `broken` is a program that fails.
    """
    (folder / "bin").mkdir()
    (folder / "metadata").mkdir()
    for name, value in attributes.items():
        (folder / "metadata" / name.replace("_", "-")).write_text(value)
    programs = {
        "curl": f'exec cat "{folder}/metadata/$(basename "${{@: -1}}")" 2>/dev/null',
        "gcloud": f'case "$*" in *"cp - "*) cat >>"{folder}/told" ;; *) exit 1 ;; esac',
        "sleep": "exit 0",
        "systemctl": "exit 1",
    } | ({broken: "exit 1"} if broken else {})
    for name, text in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    script = (ROOT / "launch/tpu_startup.sh").read_text()
    script = script.replace("need_disk_gb=20 need_memory_gb=8", f"need_disk_gb={needs} need_memory_gb=0")
    for path in ("/opt/emollama", "/var/log/emollama.log", "/run/emollama-booted"):
        script = script.replace(path, str(folder / Path(path).name))
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    lines = (folder / "emollama/environment").read_text().splitlines()
    told = [json.loads(line) for line in (folder / "told").read_text().splitlines()]
    return done.returncode, dict(line.split("=", 1) for line in lines if not line.startswith("#")), told


ONE = {
    "emollama_job": "gs://b/jobs/x",
    "agent_worker_number": "2",
    "worker_network_endpoints": "10.0.0.4,10.0.0.5,10.0.0.6",
}


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        (ONE, ("10.0.0.4:8476", "3", "2")),
        (ONE | {"worker_network_endpoints": "a:0:10.0.0.7,b:1:10.0.0.8"}, ("10.0.0.7:8476", "2", "2")),
        (ONE | {"tpu_env": TWO_SLICES}, ("10.0.0.9:8476", "6", "5")),
        (ONE | {"tpu_env": "ZONE: 'z'\n"}, ("10.0.0.4:8476", "3", "2")),
    ],
)
def test_which_process_a_machine_is(tmp_path, attributes, group):
    _, found, told = start(tmp_path, **attributes)
    assert tuple(found[f"JAX_{name}"] for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")) == group
    assert found["JAX_COORDINATOR_PORT"] == "8476"
    assert {line["process"] for line in told} == {int(group[2])}


def test_a_machine_with_too_little_disk_says_so(tmp_path):
    code, _, told = start(tmp_path, **ONE)
    assert code == 1
    assert [line["state"] for line in told] == ["installing", "unfit"]
    assert "99999 are needed" in told[-1]["message"] and told[-1]["booted"] > 1.7e9


def test_a_bucket_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "emollama/job/__pycache__").mkdir(parents=True)  # of a run before
    code, _, told = start(tmp_path, needs=0, **ONE)
    assert code == 1
    assert told[-1]["message"] == "cannot read gs://b/jobs/x"


def test_a_startup_that_fails_by_itself_is_told(tmp_path):
    code, _, told = start(tmp_path, broken="df", **ONE)
    assert code == 1
    assert told[-1]["state"] == "unfit" and "of the startup script failed" in told[-1]["message"]
