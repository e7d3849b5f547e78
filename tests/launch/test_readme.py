"""launch/README.md: every command line is accepted by whoever takes it."""

import importlib
import re
import subprocess
import sys

import pytest

from emollama_jax.config import Config, parse_flags
from tests.launch.cloud import ROOT, FakeCloud
from tests.test_docs import commands

PAGE = ROOT / "launch/README.md"
CALLS = [command.words for command in commands(PAGE) if command.words[0][0].isalpha()]
LINES = [words[: words.index("...")] if "..." in words else words for words in CALLS]


def test_the_page_calls_what_is_known():
    assert {words[0] for words in LINES} == {"emollama", "python", "docker", "kubectl", "sbatch", "uvx"}


@pytest.mark.parametrize(
    "words",
    [words for words in LINES if "emollama" in words and "prepare" not in words],
    ids=lambda words: " ".join(words)[:50],
)
def test_a_run_is_accepted_by_its_verb(words):
    verb, *arguments = words[words.index("emollama") + 1 :]
    _, rest = parse_flags([argument for argument in arguments if not argument.startswith(">")], Config())
    importlib.import_module(f"emollama_jax.cli.{verb}").make_parser().parse_args(rest)


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target


def test_launches_are_accepted(tmp_path):
    cloud = FakeCloud(tmp_path / "cloud")
    (words,) = [words for words in LINES if "launch/tpu.py" in words]
    at = words.index("launch/tpu.py") + 1
    assert cloud.start(*words[at : at + 1], "--dry-run", *words[at + 1 :]).wait(timeout=60) == 0
    (words,) = [words for words in LINES if "launch/gke.py" in words]
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "kind: JobSet" in done.stdout, done.stderr
