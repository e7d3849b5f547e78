"""The shape of the house: which module may import which, and what travels in the wheel."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "emollama_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A part may import from the lines above its own, and from itself.
ORDER = [
    {"errors", "fields"},
    {"io", "config_history", "config_parsing"},
    {"sharding", "distributed"},
    {"models", "text", "media"},
    {"config"},
    {"weights", "config_table"},
    {"data", "synthetic"},
    {"features", "runs"},
    {"train", "infer"},
    {"eval", "captions", "serve", "plan", "bench", "notebook"},
    {"cli"},
    {"__main__"},
]
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
MAY_USE_TORCH = {"weights", "bench"}
OPTIONAL = set(
    "IPython ai_edge_litert av cv2 fastapi faster_whisper gcsfs gradio jupytext matplotlib nbclient nbformat openpyxl "
    "peft playwright schemathesis sklearn tensorflow torch uvicorn".split()
)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    """The absolute dotted names that a module imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def at_the_top(tree: ast.Module) -> ast.Module:
    """The module without the insides of its functions."""

    class DropFunctions(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    return DropFunctions().visit(tree)


def roots(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    part = part_of(path)
    for name in imported(ast.parse(path.read_text())):
        package, _, below = name.partition(".")
        used = below.partition(".")[0]
        if package != "emollama_jax" or used in (part, "__version__"):
            continue
        assert part != "__init__", f"the package itself imports {name}"
        assert used in RANK and part in RANK, f"{part} -> {used}: give the new part its place in ORDER"
        assert RANK[used] < RANK[part], f"{part} imports {name}, against the direction of imports"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torch_is_lazy_and_tensorflow_absent(path):
    tree = ast.parse(path.read_text())
    everywhere = roots(imported(tree))
    assert "tensorflow" not in everywhere
    assert "torch" not in everywhere or part_of(path) in MAY_USE_TORCH
    assert not roots(imported(at_the_top(tree))) & {"torch", "peft"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_kernels_are_not_chosen_by_the_devices_of_the_process(path):
    """Only what lays out a mesh, starts the processes or reports on this machine looks at them."""
    if part_of(path) not in ("sharding", "distributed", "bench"):
        text = path.read_text()
        assert not [name for name in ("jax.default_backend(", "jax.devices()[0]") if name in text]


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_tests_can_be_collected_without_optional_packages(path):
    """As where the smoke tests run, which have one of the extras, `judge`."""
    left_out = roots(imported(at_the_top(ast.parse(path.read_text())))) & OPTIONAL
    assert not left_out, f"use pytest.importorskip for {', '.join(sorted(left_out))}"


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "configs").glob("*.py"))], ids=lambda path: path.name)
def test_every_module_has_a_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_modules_do_not_import_each_other_in_circles():
    """Imports inside functions count too."""
    graph = {}
    for path in MODULES:
        names = imported(ast.parse(path.read_text()))
        graph[module_name(path)] = names | {name.rpartition(".")[0] for name in names}
    known = graph.keys()
    graph = {name: {used for used in below if used in known and used != name} for name, below in graph.items()}
    while leaves := {name for name, below in graph.items() if not below & graph.keys()}:
        graph = {name: below for name, below in graph.items() if name not in leaves}
    assert sorted(graph) == [], "these import each other, or modules that do"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_is_about_one_thing(path):
    assert len(path.read_text().splitlines()) <= 400, "look for the second thing in it"


def test_every_folder_of_modules_is_a_package():
    assert [str(path) for path in {p.parent for p in MODULES} if not (path / "__init__.py").exists()] == []


def test_the_rules_see_what_they_are_to_see():
    tree = ast.parse("import torch.nn\ndef f():\n    from emollama_jax.data import pack\nclass A:\n    import peft\n")
    assert imported(tree) == {"torch.nn", "emollama_jax.data.pack", "peft"}
    assert roots(imported(at_the_top(tree))) == {"torch", "peft"}


@pytest.mark.skipif(not importlib.util.find_spec("setuptools"), reason="building a wheel here needs setuptools")
def test_the_wheel_is_complete_and_works_from_another_folder(tmp_path):
    source, wheels, site, elsewhere = (tmp_path / name for name in ("source", "wheels", "site", "elsewhere"))
    elsewhere.mkdir()
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("emollama_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", wheels, source], check=True)
    with zipfile.ZipFile(next(wheels.glob("emollama_jax-*.whl"))) as wheel:
        wheel.extractall(site)

    modules = {path.relative_to(ROOT) for path in MODULES}
    configs = {Path("emollama_jax/configs") / path.name for path in (ROOT / "configs").glob("*.py")}
    assert {path.relative_to(site) for path in site.rglob("*.py")} == modules | configs

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        return subprocess.run(
            command, cwd=elsewhere, env=environment, check=True, capture_output=True, text=True
        ).stdout

    assert "usage: emollama VERB" in run("-m", "emollama_jax", "--help")
    code = "import emollama_jax.config as c; print(c.__file__); print(c.load_config('tiny').llama.vocab_size)"
    assert run("-c", code).split() == [str(site / "emollama_jax/config.py"), "640"]
