"""Tiny runs: a base checkpoint and prepared data in a folder, and the command line that trains on them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from emollama_jax import cli
from emollama_jax.config import Config, load_config, parse_flags, to_dict
from emollama_jax.io.file_list import write_file_list
from emollama_jax.io.orbax_arrays import read_arrays
from emollama_jax.runs.checkpoint_files import CHECKPOINTS, META, OPT_STATE, PARAMS, find_steps
from tests.data.prepared import write_data

ROOT = Path(__file__).parents[2]
LLAMA = ROOT / "tests/data/reference_tiny/llama"


def make_inputs(folder: Path) -> Path:
    """`folder` with a base checkpoint `base` and the splits train (60 clips) and held (6) of a data set, of stored
    image tokens."""
    assert cli.main(["convert", str(LLAMA), str(folder / "base"), "--dtype", "float32"]) == 0
    path = write_data(folder / "data", {"train": 60, "held": 6}, image="image_tokens", encoders={"mae": "one"})
    seal(path, "synthetic")
    path.rename(folder / "clips")
    return folder


def seal(path: Path, fingerprint: str) -> None:
    """Gives a prepared data set a fingerprint."""
    file = path / "metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fingerprint": fingerprint}))


def write_meta(checkpoint: Path, **meta: Any) -> Path:
    """Has a checkpoint, which needs no arrays yet, say this of itself."""
    for name in (PARAMS, META):
        (checkpoint / name).mkdir(parents=True, exist_ok=True)
    (checkpoint / META / "metadata").write_text(json.dumps({"config": to_dict(load_config("tiny")), **meta}))
    write_file_list(checkpoint)
    return checkpoint


def arguments(inputs: Path, workdir: Path, **fields: Any) -> list[str]:
    """What `emollama train` is given: 4 steps of 8 rows with a checkpoint after each, and `fields`, whose double
    underscores are dots."""
    values = {
        "seed": 7,
        "data__train": f"{inputs}/clips:train",
        "data__sequence_length": 256,
        "data__clips_per_row": 2,
        "data__batch_rows": 8,
        "data__packing_rows": 8,
        "data__read_ahead": 8,
        "prompt__tasks": "emotion,reason",
        "weights__base": inputs / "base",
        "train__workdir": workdir,
        "train__steps": 4,
        "train__warmup_steps": 2,
        "train__warmup_from": 1e-3,
        "train__learning_rate": 1e-2,
        "train__log_interval": 1,
        "train__checkpoint_interval": 1,
        "train__compile_cache": inputs / "compiled",
        **fields,
    }
    # One path or a colon is no list of words: it is written as in Python.
    written = lambda name, value: repr((str(value),)) if name in ("data__train", "train__validation") else str(value)
    return [
        "--config=tiny",
        *(f"--config.{name.replace('__', '.')}={written(name, value)}" for name, value in values.items()),
    ]


def config_of(inputs: Path, workdir: Path, **fields: Any) -> Config:
    return parse_flags(arguments(inputs, workdir, **fields))[0]


def command(inputs: Path, workdir: Path, how: str = "never", step: int = 0, **fields: Any) -> list[str]:
    """The command that trains and dies as `tests/train/dying.py` says."""
    return [sys.executable, "-m", "tests.train.dying", how, str(step), *arguments(inputs, workdir, **fields)]


def environment(devices: int = 1) -> dict[str, str]:
    """For a process with so many devices; of equal flags the last one counts."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}


def start(*args: Any, devices: int = 1, **fields: Any) -> subprocess.Popen:
    """A process of `command(*args, **fields)`."""
    return spawn(command(*args, **fields), environment(devices))


def spawn(arguments: list[str], settings: dict[str, str]) -> subprocess.Popen:
    """A process in a session of its own, whose output goes to a file, `process.stdout`."""
    output = tempfile.TemporaryFile("w+")
    options = {"stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True}
    process = subprocess.Popen(arguments, env=settings, cwd=ROOT, **options)
    process.stdout = output
    return process


def finish(process: subprocess.Popen, expected: int) -> str:
    """Its output, once it has ended with the exit code expected."""
    process.wait(timeout=500)
    with contextlib.suppress(ProcessLookupError):  # a killed process leaves those behind that read for it
        os.killpg(process.pid, signal.SIGKILL)
    process.stdout.seek(0)
    output = process.stdout.read()
    process.stdout.close()
    assert process.returncode == expected, output[-3000:]
    return output


def lines(workdir: Path) -> list[dict[str, Any]]:
    """The metrics, a dict a line."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def trace(workdir: Path) -> list[tuple]:
    """What a run computed, step by step, as far as it is repeatable."""
    names = ("step", "loss", "grad_norm", "learning_rate", "targets", "tokens", "clips", "batch")
    return [tuple(line.get(name) for name in (*names, "validation_loss")) for line in lines(workdir)]


def final_state(workdir: Path) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint."""
    newest = workdir / CHECKPOINTS / str(find_steps(workdir)[-1])
    return read_arrays(newest / PARAMS) | read_arrays(newest / OPT_STATE)


def assert_same_run(one: Path, other: Path) -> None:
    """That two runs computed the same, to the last bit."""
    assert trace(one) == trace(other)
    ours, theirs = final_state(one), final_state(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].tobytes() == theirs[name].tobytes(), name
