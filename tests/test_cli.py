import ast
import subprocess
import sys
import types
from pathlib import Path

import pytest

from emollama_jax import __version__, cli
from emollama_jax.errors import UserError

pytestmark = pytest.mark.smoke

FOLDER = Path(cli.__file__).parent


@pytest.fixture
def verb(monkeypatch):
    """Makes `emollama echo` do what the function given to it does."""

    def define(run):
        module = types.ModuleType("emollama_jax.cli.echo")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(cli, "VERBS", {"echo": "Say it again.", "other": "Never called."})

    return define


def python(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=FOLDER.parent.parent, **kwargs
    )


def test_the_table_of_verbs_is_the_modules_and_their_first_lines():
    modules = {path.stem: path for path in FOLDER.glob("[!_]*.py")}
    first_lines = {
        name: ast.get_docstring(ast.parse(path.read_text())).splitlines()[0] for name, path in modules.items()
    }
    assert first_lines == cli.VERBS


def test_a_verb_gets_its_arguments_and_gives_the_exit_code(verb):
    seen = []
    verb(lambda argv: seen.append(argv))
    assert cli.main(["echo", "a", "--b=c"]) == 0
    assert seen == [["a", "--b=c"]]
    verb(lambda argv: 3)
    assert cli.main(["echo"]) == 3


def test_arguments_come_from_the_process(verb, monkeypatch):
    seen = []
    verb(lambda argv: seen.append(argv))
    monkeypatch.setattr(sys, "argv", ["emollama", "echo", "x"])
    assert cli.main() == 0
    assert seen == [["x"]]


def test_help_lists_the_verbs(verb, capsys):
    verb(None)
    assert cli.main(["--help"]) == cli.main(["-h"]) == 0
    assert "  echo       Say it again.\n" in capsys.readouterr().out
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert "usage: emollama VERB" in captured.err
    assert not captured.out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"emollama {__version__}\n"


def test_a_misspelt_verb_is_told_the_right_one(verb, capsys):
    verb(None)
    assert cli.main(["ecoh"]) == 2
    assert capsys.readouterr().err == "emollama: error: no verb 'ecoh'; did you mean echo?\n"
    assert cli.main(["zzzz"]) == 2
    assert capsys.readouterr().err == "emollama: error: no verb 'zzzz'; emollama --help lists them\n"


@pytest.mark.parametrize("argv", [["echo", "a"], ["--debug", "echo", "a"], ["echo", "a", "--debug"]])
def test_a_users_error_is_one_line_and_a_traceback_only_with_debug(verb, capsys, argv):
    def run(argv):
        assert argv == ["a"]
        raise UserError("no such clip: x.mp4; look in clips/")

    verb(run)
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[-1] == "emollama echo: error: no such clip: x.mp4; look in clips/"
    assert not captured.out
    assert ("Traceback" in captured.err) == ("--debug" in argv) == (len(lines) > 1)


def test_a_missing_file_is_a_users_error_and_a_defect_is_not(verb, capsys, tmp_path):
    verb(lambda argv: print((tmp_path / "absent").read_text()))
    assert cli.main(["echo"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("emollama echo: error: ")
    assert error.endswith("absent'\n")

    def defect(argv):
        raise OSError("socket")

    verb(defect)
    with pytest.raises(OSError, match="socket"):
        cli.main(["echo"])


def test_wrong_arguments_of_a_verb_exit_with_2(verb, capsys):
    def run(argv):
        raise SystemExit(2)

    verb(run)
    assert cli.main(["echo"]) == 2


def test_an_interrupt_exits_with_130(verb, capsys):
    def run(argv):
        raise KeyboardInterrupt

    verb(run)
    assert cli.main(["echo"]) == 130
    assert capsys.readouterr().err == "emollama echo: interrupted\n"


def test_a_reader_that_goes_away_is_quiet():
    code = "import sys; from emollama_jax.cli import main; sys.stdin.read(); sys.exit(main(['--help']))"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=FOLDER.parent.parent,
    )
    child.stdout.close()
    child.stdin.close()
    assert child.stderr.read() == ""
    child.stderr.close()
    assert child.wait() == 141


def test_python_m_is_the_same_command():
    done = python("-m", "emollama_jax", "--version")
    assert (done.returncode, done.stdout) == (0, f"emollama {__version__}\n")
    assert python("-m", "emollama_jax", "zzzz").returncode == 2


def test_help_imports_nothing_heavy():
    code = "import sys; from emollama_jax.cli import main; main(['--help']); print('modules:', *sys.modules)"
    modules = set(python("-c", code, check=True).stdout.partition("modules:")[2].split())
    assert "emollama_jax.cli" in modules
    assert not modules & {"jax", "flax", "transformers", "numpy", "torch", "ml_collections"}
