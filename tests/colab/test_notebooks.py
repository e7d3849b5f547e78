"""The notebooks of colab/: their files are what the scripts say, and what Colab needs."""

import ast
import importlib
import importlib.util
import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from emollama_jax import cli
from emollama_jax.config import Config, parse_flags

ROOT = Path(__file__).parents[2]
COLAB = ROOT / "colab"
NAMES = ("demo", "finetune", "export_to_pytorch")
SCRIPTS = {name: (COLAB / f"{name}.py").read_text() for name in NAMES}
NOTEBOOKS = {name: json.loads((COLAB / f"{name}.ipynb").read_text()) for name in NAMES}
FORM = re.compile(r"^([A-Z_]+) = (.+?)  # @param (.+)$", re.M)
each = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def setup():
    """The arguments of setup() in setup.py."""
    setuptools = pytest.importorskip("setuptools")
    found, real = {}, setuptools.setup
    setuptools.setup = lambda **arguments: found.update(arguments)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = real
    return found


def code_cells(name: str) -> list[str]:
    return ["".join(cell["source"]) for cell in NOTEBOOKS[name]["cells"] if cell["cell_type"] == "code"]


def shell_lines(name: str) -> list[str]:
    lines = (line.strip() for cell in code_cells(name) for line in cell.splitlines())
    return [line[1:] for line in lines if line.startswith(("!", "%")) and not line.startswith("%%")]


def test_all_notebooks_are_tried():
    assert {path.stem for path in COLAB.glob("*.ipynb")} == set(NAMES)


def import_generate(root: Path = ROOT):
    pytest.importorskip("jupytext")
    spec = importlib.util.spec_from_file_location("generate", root / "colab/generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    return generate


@each
def test_a_notebook_is_what_its_script_says(name):
    generate = import_generate()
    assert {path.stem for path in generate.SCRIPTS} == set(NAMES)
    assert (COLAB / f"{name}.ipynb").read_text() == generate.text_of(COLAB / f"{name}.py"), (
        "make the notebooks again: python colab/generate.py"
    )


def test_the_address_is_set_in_setup_py_alone(tmp_path, setup):
    """Another `url` and a call of generate.py change it wherever it stands."""
    old, new = setup["url"].removeprefix("https://github.com/"), "some.one/a-fork"
    shutil.copytree(COLAB, tmp_path / "colab")
    (tmp_path / "setup.py").write_text((ROOT / "setup.py").read_text().replace(old, new))
    import_generate(tmp_path).main()
    for before in (path for path in COLAB.iterdir() if path.suffix in (".py", ".md", ".ipynb")):
        count = before.read_text().count(old)
        after = (tmp_path / "colab" / before.name).read_text()
        assert (after.count(old), after.count(new)) == (0, count) and (count or before.name == "generate.py")


@each
def test_a_notebook_is_valid_and_carries_nothing_of_a_run(name):
    pytest.importorskip("nbformat").validate(NOTEBOOKS[name])
    for cell in NOTEBOOKS[name]["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    text = json.dumps(NOTEBOOKS[name])
    assert not re.search(r"hf_\w{10,}|/(home|root|work|tmp|Users|content)/|[\w.]+@[\w.]+\.\w+", text)


@each
def test_every_line_ends_where_it_should(name):
    for cell in NOTEBOOKS[name]["cells"]:
        *lines, last = cell["source"]
        assert all(line.endswith("\n") and line.count("\n") == 1 for line in lines) and not last.endswith("\n")


@each
def test_metadata_asks_for_a_gpu(name):
    assert NOTEBOOKS[name]["metadata"]["accelerator"] == "GPU"
    assert NOTEBOOKS[name]["metadata"]["colab"] == {"gpuType": "T4", "provenance": []}


@each
def test_magics_stand_where_they_work_and_every_cell_compiles(name):
    transformer = pytest.importorskip("IPython.core.inputtransformer2").TransformerManager()
    for cell in code_cells(name):
        assert all(not line.lstrip().startswith("%%") for line in cell.splitlines()[1:]), cell
        ast.parse(transformer.transform_cell(cell))
        assert not re.search(r"^\s*# [!%]", cell, re.M), f"a magic that is a comment: {cell}"


@each
def test_badges_and_sources_lead_to_the_repository(name, setup):
    repository = setup["url"].removeprefix("https://github.com/")
    badge = f"https://colab.research.google.com/github/{repository}/blob/main/colab/{name}.ipynb"
    text = "".join(NOTEBOOKS[name]["cells"][0]["source"])
    assert re.findall(r"\((https://colab[^)]+\.ipynb)\)", text) == [badge]
    page = (COLAB / "README.md").read_text()
    assert badge in page and len(re.findall(r"github/\S+/blob/", page)) == len(NAMES)
    assert dict((found[0], found[1]) for found in FORM.findall(SCRIPTS[name]))["SOURCE"] == f'"git+{setup["url"]}"'


@each
def test_pins_are_those_of_setup_py(name, setup):
    known = {Requirement(text) for extra in setup["extras_require"].values() for text in extra}
    known |= {Requirement(text) for text in setup["install_requires"]}
    pins = [text for line in shell_lines(name) for text in re.findall(r'"([\w-]+[<>=!~][^"]*)"', line)]
    assert {Requirement(pin) for pin in pins} <= known
    assert bool(pins) == (name == "export_to_pytorch")
    extras = set(re.findall(r'"(\w+)"', "".join(re.findall(r"^extras = .+$", SCRIPTS[name], re.M)))) - {"7B"}
    assert extras and {*extras, "cuda", "tpu"} <= set(setup["extras_require"])
    versions = json.loads(dict((n, choices) for n, _, choices in FORM.findall(SCRIPTS[name]))["PYTHON"])
    assert all(version in SpecifierSet(setup["python_requires"]) for version in versions)


@each
def test_forms_offer_what_they_begin_with(name):
    for field, value, choices in FORM.findall(SCRIPTS[name]):
        assert not choices.startswith("[") or ast.literal_eval(value) in json.loads(choices), field


@each
def test_commands_are_accepted_by_their_verbs(name):
    found = [line for line in shell_lines(name) if line.startswith("emollama ")]
    assert len(found) >= 2
    for line in found:
        filled = re.sub(r"\{\{", "{", re.sub(r"\{(LISTS|ENCODERS|ASK|TORCH)\}", "", line))
        verb, *arguments = shlex.split(re.sub(r"\{\w+\}", "tiny", filled))[1:]
        if verb == "--version":
            continue
        assert verb in cli.VERBS
        _, rest = parse_flags(arguments, Config())
        importlib.import_module(f"emollama_jax.cli.{verb}").make_parser().parse_args(rest)
