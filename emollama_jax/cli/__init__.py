"""The command `emollama VERB ...`.

A verb is the module `emollama_jax/cli/VERB.py`: the first line of its docstring is its line of help, `make_parser()`
makes the parser of its arguments, and `run(argv) -> int | None` does the work and gives the exit code (None is 0). Only
the verb asked for is imported.
"""

import contextlib
import difflib
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence

from emollama_jax import __version__
from emollama_jax.cli._background import background_reports_held
from emollama_jax.errors import UserError, as_user_error

VERBS = {
    "quickstart": "Run every step once, on synthetic clips with a small language model.",
    "fetch": "Fetch the weights of the real model.",
    "convert": "Convert a language model between weight formats.",
    "export": "Export trained adapters and projectors for PyTorch.",
    "extract": "Turn raw videos into features and records.",
    "compare": "Compare two sets of features, and say whether they can be mixed.",
    "annotate": "Make MERR-style annotations of raw clips: labels, descriptions, captions.",
    "prepare": "Turn videos, features and annotations into records for training.",
    "train": "Train adapters and projectors, or resume an interrupted run.",
    "predict": "Ask a model about videos or records.",
    "serve": "Answer questions about clips over HTTP, and in the browser.",
    "demo": "Ask about clips on a page in the browser.",
    "evaluate": "Evaluate a model, or answers in a file, on a benchmark.",
    "baseline": "Train small heads on stored features, each alone and all together.",
    "judge": "Judge free-form answers by the annotators' descriptions (EMER).",
    "doctor": "Check a host or a pod before a run, or every byte of runs and base checkpoints.",
    "params": "Count the parameters of an experiment, in all and trained.",
    "plan": "Estimate memory and speed on TPUs and GPUs without having them.",
    "bench": "Measure speed and memory on this machine.",
}


class Terminated(BaseException):
    """SIGTERM, so that what is half done is removed on the way out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's) and returns its exit code.

    0 is success, 2 an error the user can mend, 130 an interrupt, 141 a reader that went away, 143 an end by SIGTERM;
    other codes are the exception's `exit_code` or the verb's. An error the user can mend is one line on standard error,
    with its traceback before it where `--debug` is among the arguments.
    """
    for stream in (sys.stdout, sys.stderr):  # names of files are bytes, and terminals do not write every letter
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    os.environ["MPLBACKEND"] = "agg"  # figures are files; a notebook that runs us has a backend of its own packages
    ends_process = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    command = " ".join(["emollama", *(verb for verb in argv[:1] if verb in VERBS)])
    try:
        reports = contextlib.nullcontext() if debug else background_reports_held(ends_process=ends_process)
        with _ended_by_sigterm(), reports:
            code = _dispatch(argv)
        sys.stdout.flush()
        return code or 0
    except SystemExit as stop:  # argparse, after its help or its own line of error
        return stop.code or 0
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return 130
    except Terminated:
        print(f"{command}: ended by SIGTERM", file=sys.stderr)
        return 128 + signal.SIGTERM
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it flushes at exit
        return 141
    except Exception as error:
        known = as_user_error(error)
        if known is None:
            raise
        if debug:
            traceback.print_exc()
        print(f"{command}: error: {known}", file=sys.stderr)
        return known.exit_code


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within the block SIGTERM raises `Terminated`; a second one ends the process at once."""

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _dispatch(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    verb, *rest = argv
    if verb == "--version":
        print(f"emollama {__version__}")
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        remedy = f"did you mean {near[0]}?" if near else "emollama --help lists them"
        raise UserError(f"no verb {verb!r}; {remedy}")
    return importlib.import_module(f"emollama_jax.cli.{verb}").run(rest)


def _help() -> str:
    verbs = "\n".join(f"  {verb:<10} {line}" for verb, line in VERBS.items())
    return f"""Emotion-LLaMA in JAX and Flax.

usage: emollama VERB [--config NAME_OR_PATH] [--config.GROUP.FIELD=VALUE ...] [...]
       emollama VERB --help

{verbs}

--debug    show the traceback of an error
--version  show the version"""
