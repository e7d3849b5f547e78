"""launch/slurm.sbatch on a real Slurm of one node, with two processes on the CPU."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.slurm import slurm, why_not
from tests.train.runs import ROOT, arguments, assert_same_run, environment, finish, make_inputs, spawn

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]
ON_CPU = ["--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=1000"]
STEPS = {"train__steps": 60, "train__checkpoint_interval": 20, "mesh__fsdp": 2}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("slurm")) as settings:
        path = f"{Path(sys.executable).parent}{os.pathsep}{settings['PATH']}"
        yield environment() | {"SLURM_CONF": settings["SLURM_CONF"], "PATH": path}


def submit(cluster, log: Path, *command: str) -> str:
    """The number of the job that runs a command."""
    options = [*ON_CPU, "--parsable", f"--output={log}", "--chdir", str(ROOT)]
    done = subprocess.run(
        ["sbatch", *options, str(ROOT / "launch/slurm.sbatch"), *command], env=cluster, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait(is_so, log: Path, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, log.read_text()[-3000:] if log.exists() else "no log"
        time.sleep(0.1)


def state(cluster, job: str) -> dict[str, str]:
    shown = subprocess.run(["scontrol", "show", "job", job], env=cluster, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    return dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)


def test_a_run_that_is_preempted_is_queued_again_and_ends_as_if_it_had_not_been(cluster, tmp_path):
    inputs, log = make_inputs(tmp_path), tmp_path / "log"
    pod = [sys.executable, "launch/local_pod.py", "--processes", "2", "--devices", "1", "--"]
    train = ["emollama", "train", *arguments(inputs, tmp_path / "unbroken", **STEPS)]
    finish(spawn([*pod, *train], cluster), 0)
    job = submit(cluster, log, "emollama", "train", *arguments(inputs, tmp_path / "run", **STEPS))
    text = lambda: log.read_text() if log.exists() else ""
    wait(lambda: "step 5/60" in text(), log)
    subprocess.run(["scancel", "--signal=TERM", job], env=cluster, check=True)
    wait(lambda: "queued again" in text(), log)
    assert "exit code 75: queued again" in text() and "step 60/60" not in text()
    wait(lambda: state(cluster, job)["JobState"] == "COMPLETED", log)
    assert "start 2" in text() and "resumed from step" in text()
    assert state(cluster, job)["Restarts"] == "1"
    assert text().count("ok    devices: 2 x cpu") == 2  # the checks, at each start
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.parametrize(("code", "ends"), [(2, "FAILED"), (134, "PENDING")])
def test_who_mends_an_end(cluster, tmp_path, code, ends):
    log = tmp_path / "log"
    job = submit(cluster, log, "bash", "-c", f"exit {code}")
    if ends == "PENDING":
        wait(lambda: log.exists() and f"exit code {code}: queued again" in log.read_text(), log)
    wait(lambda: state(cluster, job)["JobState"] == ends, log)
    if ends == "PENDING":
        subprocess.run(["scancel", job], env=cluster, check=True)
    else:
        assert state(cluster, job)["ExitCode"] == f"{code}:0"
