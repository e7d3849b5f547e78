"""LLaMA-2-7B in the memory of Colab's free machine. EMOLLAMA_7B=1 runs it: it needs 25 GB of disk and some minutes."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 12_700_000_000  # bytes of memory of a Colab machine with a T4
NOT_INHERITED = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("EMOLLAMA_7B"), reason="EMOLLAMA_7B is not set: 25 GB of disk"),
]


def run(*arguments: str | Path) -> str:
    """Run a module of Python with no more address space than the limit; return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0
    return done.stdout


def test_it_is_converted_loaded_and_asked(tmp_path):
    run("tests.colab.seven_b", "write", tmp_path / "hf")
    run("emollama_jax", "convert", tmp_path / "hf", tmp_path / "base", "--kernel-dtype", "int8")
    peak = float(re.search(r"peak ([\d.]+) GB", run("tests.colab.seven_b", "answer", tmp_path / "base"))[1])
    assert 6.7 < peak < LIMIT / 1e9  # the weights are there, and nothing twice
