"""`emollama doctor` without paths: a host, and two as a pod."""

import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from emollama_jax import cli
from emollama_jax.train import host_checks
from tests.train.runs import ROOT, arguments, make_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def doctor(capsys, *argv: str) -> tuple[int, dict[str, str]]:
    """The exit code, and what is said of each thing, "wrong" or "ok" first."""
    code = cli.main(["doctor", *argv])
    lines = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()]
    return code, {rest.partition(": ")[0]: f"{verdict} {rest.partition(': ')[2]}" for verdict, rest in lines}


def test_a_host_without_an_experiment(capsys):
    code, said = doctor(capsys)
    assert code == 0
    assert list(said) == ["versions", "devices", "disk", "memory", "/dev/shm", "code", "clock"]
    assert all(line.startswith("ok ") for line in said.values())
    assert "jax 0." in said["versions"] and said["devices"].startswith("ok 8 x cpu")


def test_an_experiment_that_fits_and_leaves_no_trace(inputs, tmp_path, capsys):
    code, said = doctor(capsys, *arguments(inputs, tmp_path / "runs/new", mesh__fsdp=8))
    assert code == 0, said
    assert said["data.train"] == "ok 60 clips in 1 data sets"
    assert said["mesh"].startswith("ok data=1 fsdp=8 tensor=1")
    assert said["train.workdir"] == f"ok {tmp_path}/runs/new: written and read"
    assert list(tmp_path.iterdir()) == []


def test_each_thing_that_is_wrong_is_one_line(inputs, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(host_checks.shutil, "disk_usage", lambda path: Usage(1, 1, 2**20))
    wrong = {"data__train": "nowhere:train", "weights__base": "nowhere", "mesh__fsdp": 3, "data__workers": 2}
    code, said = doctor(capsys, *arguments(inputs, tmp_path / "file/run", **wrong))
    assert code == 1
    found = {name for name, line in said.items() if line.startswith("wrong ")}
    assert found == {"disk", "/dev/shm", "mesh", "data.train", "weights", "train.workdir"}
    assert "does not fit 8 devices" in said["mesh"]
    assert "Not a directory" in said["train.workdir"]


OTHER_HOST = """
import os, sys, time
from emollama_jax import cli
from emollama_jax.train import host_checks
if os.environ["JAX_PROCESS_ID"] == "1":
    now = time.time
    host_checks.time.time = lambda: now() + 60
    host_checks.__file__ = sys.argv[1] + "/train/host_checks.py"
sys.exit(cli.main(["doctor", *sys.argv[2:]]))
"""


@pytest.mark.slow  # two processes
def test_two_hosts_that_differ(inputs, tmp_path):
    """The second has other code, another clock, and a folder of its own for the run."""
    (tmp_path / "package/train").mkdir(parents=True)
    (tmp_path / "package/train/x.py").write_text("")
    # A relative folder is each host's own, where each has a working folder of its own.
    for i in (0, 1):
        (tmp_path / f"host{i}").mkdir()
    script = f'cd {tmp_path}/host$JAX_PROCESS_ID && exec "$0" "$@"'
    argv = arguments(inputs, Path("run"), mesh__fsdp=2)
    command = ["bash", "-c", script, sys.executable, "-c", OTHER_HOST, str(tmp_path / "package"), *argv]
    pod = [sys.executable, "launch/local_pod.py", "--processes", "2", "--devices", "1", "--", *command]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(pod, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, json.dumps(done.stdout)
    wrong = [line for line in done.stdout.splitlines() if " wrong " in line]
    for said in (
        "[0] wrong code: process 1 has another one than process 0",
        "[1] wrong code: process 1 has another one than process 0",
        "[0] wrong clock: that of process 1 is 60 s off",
        "[1] wrong train.workdir: ",
        "[0] wrong other hosts: process 1 found what is wrong",
    ):
        assert [line for line in wrong if line.startswith(said)], (said, wrong)
    assert not [line for line in wrong if line.startswith("[0] wrong train.workdir")]
