"""`launch/tpu.py` beside a fake gcloud, and what both say, in one transcript."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
BASE = ["--name=stage1", "--zone=us-west4-a", "--bucket=gs://mine", "--poll=0"]
TRAIN = ["--", "emollama", "train", "--config", "stage1_v5e_16", "--config.train.workdir=gs://mine/runs/stage1"]


class FakeCloud:
    """A cloud in a folder, with what the scenario says (see `fake_gcloud.py`)."""

    def __init__(self, folder: Path, **scenario: Any):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        (folder / "bin/gcloud").write_text(f'#!/bin/sh\nexec {sys.executable} -SIE "{fake()}" "$@"\n')
        (folder / "bin/gcloud").chmod(0o755)
        (folder / "emollama_jax-1.0-py3-none-any.whl").write_bytes(b"a wheel")
        self.wheel = f"--wheel={folder}/emollama_jax-1.0-py3-none-any.whl"
        self.change(**scenario)

    def change(self, **scenario: Any) -> None:
        (self.folder / "scenario.json").write_text(json.dumps(scenario))

    def start(self, *arguments: str, cwd: Path = ROOT) -> subprocess.Popen:
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"FAKE_CLOUD": str(self.folder), "PATH": path}
        transcript = (self.folder / "transcript").open("a")
        shown = " ".join(word for word in arguments if word not in BASE and word != self.wheel)
        transcript.write(f"\n# tpu.py {shown}\n")
        transcript.flush()
        command = [sys.executable, str(ROOT / "launch/tpu.py"), *arguments]
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdout=transcript,
            stderr=transcript,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it in the background
        )

    def run(self, verb: str, *arguments: str, cwd: Path = ROOT) -> int:
        """The exit code of a verb."""
        code = self.start(verb, *BASE, *arguments, cwd=cwd).wait(timeout=60)
        with (self.folder / "transcript").open("a") as transcript:
            transcript.write(f"# exit code {code}\n")
        return code

    def up(self, verb: str, *arguments: str) -> int:
        return self.run(verb, "--type=v5e-16", self.wheel, *arguments, *TRAIN)

    def file(self, name: str) -> Path:
        """An object of the job."""
        return self.folder / "bucket/mine/jobs/stage1" / name

    def transcript(self) -> str:
        text = (self.folder / "transcript").read_text()
        # The interpreter first: it may lie below the repository.
        for path, name in ((sys.executable, "python"), (str(self.folder), "FOLDER"), (str(ROOT), "ROOT")):
            text = text.replace(path, name)
        text = re.sub(r"/\S*/tmp\w{8}(?=[/ \n])", "TEMPORARY", text)
        # Whole chip-hours: a slow machine spends some seconds between a boot and the look at it.
        text = re.sub(r"(\d+\.\d) chip-hours", lambda found: f"{float(found[1]):.0f} chip-hours", text)
        return re.sub(r"(?m)^\d\d:\d\d:\d\d  ", "HH:MM:SS  ", text).lstrip()


def fake() -> Path:
    return Path(__file__).parent / "fake_gcloud.py"


def check_golden(name: str, text: str) -> None:
    """Compares with a file of `golden/`; EMOLLAMA_WRITE_GOLDEN=1 writes it instead."""
    file = GOLDEN / name
    if os.environ.get("EMOLLAMA_WRITE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()
