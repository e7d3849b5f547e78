import ast
import errno
import importlib
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from jax.errors import JaxRuntimeError
from safetensors import SafetensorError

from emollama_jax import __version__, cli
from emollama_jax.cli._arguments import VerbParser, add_config_argument, at_least, parse
from emollama_jax.distributed import NotStarted
from emollama_jax.errors import UserError
from emollama_jax.infer.output import OutputError

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


def test_figures_are_drawn_without_the_backend_of_a_notebook(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.of_another_environment")
    assert cli.main(["--version"]) == 0
    code = "import matplotlib; print(matplotlib.get_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "agg\n", done.stderr


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


# As the libraries raise them, where disks are full and where memory or devices are missing.
LIBRARY_ERRORS = [
    (OSError(errno.ENOSPC, "No space left on device"), 2, "[Errno 28] No space left on device; make room"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "Disk quota exceeded; make room"),
    (OSError(errno.EFBIG, "File too large"), 2, "File too large"),
    (OSError(errno.EIO, "Input/output error"), 2, "Input/output error"),
    (OSError(errno.EROFS, "Read-only file system", "/out"), 2, "Read-only file system: '/out'"),
    (OSError("2097152 requested and 65536 written"), 2, "cannot write"),  # numpy
    (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), 2, "make room"),
    (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), 2, "cannot write"),  # torch
    (ValueError('RESOURCE_EXHAUSTED: Error writing "d/1" [OS error 28: ENOSPC No space left on device]'), 2, "room"),
    (RuntimeError("Failed to write: No space left on device; writing x.array_record"), 2, "make room"),
    (MemoryError(), 3, "too little memory: MemoryError"),
    (JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"), 3, "too little memory: RESOURCE"),
    (RuntimeError("Unable to initialize backend 'cuda': x"), 3, "no devices (Unable to"),
    (JaxRuntimeError("UNIMPLEMENTED: Unsupported element type for DotThunk: F16_F16_F32"), 3, "choose another compute"),
    (NotStarted("no devices"), 3, "no devices"),
    (OutputError("locked"), 4, "locked"),
]


@pytest.mark.smoke
@pytest.mark.parametrize("name", cli.VERBS)
def test_what_libraries_raise_is_one_line_with_its_exit_code_at_every_verb(name, monkeypatch, capsys):
    module = importlib.import_module(f"emollama_jax.cli.{name}")
    for error, code, said in LIBRARY_ERRORS:
        for raised in (error, ValueError("saving failed")):
            raised.__cause__ = error if raised is not error else None

            def run(argv, raised=raised):
                raise raised

            monkeypatch.setattr(module, "run", run)
            assert cli.main([name]) == code, error
            shown = capsys.readouterr().err
            assert shown.startswith(f"emollama {name}: error: ") and said in shown and shown.count("\n") == 1, shown


def test_a_platform_that_is_not_there_is_exit_code_3():
    """By every verb that computes; JAX says it by a failed assertion."""
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    done = python("-m", "emollama_jax", "params", "--config=tiny", "--config.mesh.data=-1", env=environment)
    assert done.returncode == 3
    line = "no devices (JAX_PLATFORMS=cuda is not there); JAX_PLATFORMS=cpu runs on the processor"
    assert done.stderr.splitlines()[-1] == f"emollama params: error: {line}"


def test_sigterm_cleans_up_and_exits_with_143(verb, capsys):
    cleaned = []

    def run(argv):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    verb(run)
    assert cli.main(["echo"]) == 143
    assert cleaned == [signal.SIG_DFL] and signal.getsignal(signal.SIGTERM) == before
    assert capsys.readouterr().err == "emollama echo: ended by SIGTERM\n"


def test_other_errors_of_jax_are_defects(verb):
    def run(argv):
        raise JaxRuntimeError("INTERNAL: what")

    verb(run)
    with pytest.raises(JaxRuntimeError):
        cli.main(["echo"])


def test_the_help_and_a_wrong_argument_need_no_experiment(capsys):
    parser = VerbParser(prog="emollama echo")
    add_config_argument(parser)
    parser.add_argument("--steps", type=at_least(1), required=True)
    with pytest.raises(SystemExit) as stop:
        parse(parser, ["--help"])
    assert stop.value.code == 0 and "--config NAME_OR_PATH" in capsys.readouterr().out
    config, arguments = parse(parser, ["--config=tiny", "--config.seed=7", "--steps", "2"])
    assert (config.seed, arguments.steps) == (7, 2)
    assert parse(parser, ["--steps=1"], default=config)[0] == config
    for argv, said in (
        (["--config=tiny"], "the following arguments are required: --steps"),
        (["--config=tiny", "--steps=0"], "'0' is not a whole number from 1 on"),
        (["--config=tiny", "--steps=1", "more"], "unrecognized arguments: more; emollama echo --help lists"),
        (["--steps=1"], "no experiment given"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            parse(parser, argv)
        assert "\n" not in str(caught.value)


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


@pytest.mark.smoke
def test_python_m_is_the_same_command():
    done = python("-m", "emollama_jax", "--version")
    assert (done.returncode, done.stdout) == (0, f"emollama {__version__}\n")
    assert python("-m", "emollama_jax", "zzzz").returncode == 2


def test_help_imports_nothing_heavy():
    code = "import sys; from emollama_jax.cli import main; main(['--help']); print('modules:', *sys.modules)"
    modules = set(python("-c", code, check=True).stdout.partition("modules:")[2].split())
    assert "emollama_jax.cli" in modules
    assert not modules & {"jax", "flax", "transformers", "numpy", "torch", "ml_collections"}
