"""Tiny runs of two processes with four devices each."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.train.runs import command, environment, finish, spawn


def start_pod(*args: Any, devices: int = 4, **fields: Any) -> subprocess.Popen:
    """A pod of two processes of `command(*args, **fields)`, of which both die where it says so."""
    pod = [sys.executable, "launch/local_pod.py", "--processes", "2", "--devices", str(devices), "--"]
    return spawn([*pod, *command(*args, **fields)], environment())


def finish_pod(process: subprocess.Popen, expected: int) -> str:
    """Its output; an exit code below 0 is a signal, which the pod reports as 128 and its number."""
    return finish(process, 128 - expected if expected < 0 else expected)


def children(pod: subprocess.Popen) -> list[int]:
    """The ids of a pod's processes, in their order."""
    return [int(number) for number in Path(f"/proc/{pod.pid}/task/{pod.pid}/children").read_text().split()]
