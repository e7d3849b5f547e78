"""README and docs: verbs accept every command, every name in a Python block exists, links have their files."""

import ast
import contextlib
import importlib
import inspect
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from emollama_jax import cli
from emollama_jax.config import Config, parse_flags

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "colab/README.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITERS = {"bash", "cd", "curl", "ln", "mkdir", "pip", "python", ".venv/bin/ruff", "unzip"}  # what else a page may call


class Command(NamedTuple):
    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)[:60]}"


def commands(page: Path) -> list[Command]:
    """The commands in the indented blocks of a page, without their comments; `&&` joins two."""
    lines = re.sub(r"```.*?```", "", page.read_text(), flags=re.S).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        if line.startswith("    ") and (words := shlex.split(line, comments=True)):
            while "&&" in words:
                at = words.index("&&")
                found.append(Command(page.name, tuple(words[:at])))
                words = words[at + 1 :]
            found.append(Command(page.name, tuple(words)))
    return found


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)


COMMANDS = [command for page in PAGES for command in commands(page) if command.words[0] in {"emollama", *WRITERS}]
EMOLLAMA = [command for command in COMMANDS if "emollama" in command.words]
BLOCKS = [(page.name, i, block) for page in PAGES for i, block in enumerate(blocks(page))]


def test_pages_call_only_what_is_known():
    calls = {command.words[0] for page in PAGES for command in commands(page) if "→" not in command.words}
    assert calls <= {"emollama", *WRITERS}
    assert len(EMOLLAMA) > 40 and len(BLOCKS) >= 6


@pytest.mark.parametrize("command", EMOLLAMA, ids=str)
def test_a_command_is_accepted_by_its_verb(command):
    """Arguments and configuration are parsed as the verb parses them; what they name is not looked for."""
    verb, *arguments = command.words[command.words.index("emollama") + 1 :]
    assert verb in cli.VERBS, f"{command.page}: no verb {verb}"
    _, rest = parse_flags(arguments, Config())
    with pytest.raises(SystemExit) if {"-h", "--help"} & set(rest) else contextlib.nullcontext():
        importlib.import_module(f"emollama_jax.cli.{verb}").make_parser().parse_args(rest)


@pytest.mark.parametrize(("page", "number", "code"), BLOCKS, ids=lambda value: str(value)[:20])
def test_what_a_python_block_calls_exists_and_takes_its_arguments(page, number, code):
    tree, known = ast.parse(code), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            known |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    assert known or "import" not in code
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = known.get(call.func.id) if isinstance(call.func, ast.Name) else None
        if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
            function = getattr(known.get(call.func.value.id), call.func.attr, None)
        if function is not None and not any(keyword.arg is None for keyword in call.keywords):
            inspect.signature(function).bind(*call.args, **{keyword.arg: None for keyword in call.keywords})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def test_readme_is_a_page_to_read_in_one_go():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
