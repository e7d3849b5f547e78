"""launch/Dockerfile and launch/skypilot.yaml, as far as they can be tried without a builder or a cloud."""

import re
import shutil
import subprocess

import pytest

from emollama_jax.config import load_config
from tests.launch.cloud import ROOT

DOCKERFILE = (ROOT / "launch/Dockerfile").read_text()


def test_what_is_copied_is_there_and_goes_to_the_builder():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for line in re.findall(r"(?m)^COPY (.+) \S+$", DOCKERFILE) for word in line.split()}
    assert copied >= {"setup.py", "pyproject.toml", "constraints.txt", "LICENSE", "configs", "emollama_jax"}
    assert all((ROOT / name).exists() for name in copied | kept)
    assert {name.partition("/")[0] for name in copied} == kept


def test_the_image_has_a_python_that_the_package_runs_on():
    (version,) = re.findall(r"(?m)^FROM python:(\d+\.\d+)-slim", DOCKERFILE)
    assert version in ("3.11", "3.12", "3.13")


@pytest.mark.skipif(not shutil.which("hadolint"), reason="no hadolint here")
def test_hadolint_finds_nothing():
    done = subprocess.run(["hadolint", str(ROOT / "launch/Dockerfile")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_task_for_skypilot():
    task = pytest.importorskip("yaml").safe_load((ROOT / "launch/skypilot.yaml").read_text())
    assert set(task) == {"name", "resources", "workdir", "envs", "setup", "run"}
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75, 3, 134, 137]}
    assert load_config(task["envs"]["CONFIG"])
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n", "-c", script], check=True)
