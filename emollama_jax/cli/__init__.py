"""The command `emollama VERB ...`.

A verb is the module `emollama_jax/cli/VERB.py`: the first line of its docstring is its line of help, `make_parser()`
makes the parser of its arguments, and `run(argv) -> int | None` does the work and gives the exit code (None is 0). Only
the verb asked for is imported.
"""

import difflib
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from emollama_jax import __version__
from emollama_jax.errors import UserError

VERBS = {
    "quickstart": "Run every step once, on synthetic clips with a small language model.",
    "convert": "Convert a language model between weight formats.",
    "export": "Export trained adapters and projectors for PyTorch.",
    "extract": "Turn raw videos into features and records.",
    "compare": "Compare two sets of features, and say whether they can be mixed.",
    "prepare": "Turn videos, features and annotations into records for training.",
    "train": "Train adapters and projectors, or resume an interrupted run.",
    "predict": "Ask a model about videos or records.",
    "evaluate": "Evaluate a model, or answers in a file, on a benchmark.",
    "judge": "Judge free-form answers by the annotators' descriptions (EMER).",
    "params": "Count the parameters of an experiment, in all and trained.",
    "plan": "Estimate memory and speed on TPUs and GPUs without having them.",
    "bench": "Measure speed and memory on this machine.",
}

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)


class OutOfMemoryError(UserError):
    """The devices have too little memory for the model or a batch."""

    exit_code = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's) and returns its exit code.

    0 is success, 2 an error the user can mend, 130 an interrupt, 141 a reader that went away; other codes are the
    exception's `exit_code` or the verb's. An error the user can mend is one line on standard error, with its traceback
    before it where `--debug` is among the arguments.
    """
    for stream in (sys.stdout, sys.stderr):  # names of files are bytes, and terminals do not write every letter
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    command = " ".join(["emollama", *(verb for verb in argv[:1] if verb in VERBS)])
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code or 0
    except SystemExit as stop:  # argparse, after its help or its own line of error
        return stop.code or 0
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it flushes at exit
        return 141
    except Exception as error:
        known = _user_error(error)
        if known is None:
            raise
        if debug:
            traceback.print_exc()
        print(f"{command}: error: {known}", file=sys.stderr)
        return known.exit_code


def _user_error(error: Exception) -> UserError | None:
    """Return an exception as the error that a user can mend; None for a defect."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and (error.filename is not None or error.errno in OUT_OF_SPACE):
        return UserError(str(error))
    if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):  # JAX is not imported here
        return OutOfMemoryError(f"the devices have too little memory: {str(error).splitlines()[0][:200]}")
    return None


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
