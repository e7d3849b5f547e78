"""LLaMA-2-7B in the memory of Colab's free machine. EMOLLAMA_7B=1 runs it: it needs 25 GB of disk and some minutes."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 12_700_000_000  # bytes of memory of a Colab machine with a T4
NOT_INHERITED = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("EMOLLAMA_7B"), reason="EMOLLAMA_7B is not set: 25 GB of disk"),
]


def run(*arguments: str | Path) -> float:
    """Run a module of Python with no more address space than the limit; return its peak memory in GB, and print it."""
    environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT)),
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    peak = usage.ru_maxrss * 1024 / 1e9
    print(f"{arguments[1]}: peak {peak:.2f} GB", flush=True)
    return peak


@pytest.fixture
def folder(tmp_path) -> Iterator[Path]:
    """A folder whose 20 GB pytest does not keep."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_it_is_converted_loaded_and_asked(folder):
    run("tests.colab.seven_b", "write", folder / "hf")
    run("emollama_jax", "convert", folder / "hf", folder / "base", "--kernel-dtype", "int8")
    shutil.rmtree(folder / "hf")
    assert 6.7 < run("tests.colab.seven_b", "answer", folder / "base")  # all weights are there
