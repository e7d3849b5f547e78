"""The exception for mistakes that a user can mend, and errors in one line.

What libraries raise where a disk is full, memory is short or devices are missing becomes such an exception in one
place, `as_user_error`: the command line prints it, and whoever loads a model passes it on.
"""

import errno
import os
import re
import traceback

# Errors of the machine, which come without a file's name where a descriptor is written to.
MACHINE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.ETIMEDOUT),
    *(errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOLCK),
)
# As Python, safetensors, TensorStore, ArrayRecord, NumPy and torch's zip files say it.
NO_SPACE = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|os error (28|122|27)\b"
    r"|\d+ requested and \d+ written|PytorchStreamWriter failed|unexpected pos \d+ vs \d+",
    re.IGNORECASE,
)
NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|Out of memory|Unable to allocate", re.IGNORECASE)
NO_DEVICE = re.compile(r"Unable to initialize backend|Unknown backend|no supported devices found|No visible .* device")
UNSUPPORTED = re.compile(r"UNIMPLEMENTED|is not supported|not supported on this backend", re.IGNORECASE)
JAX_STARTS = "jax/_src/xla_bridge.py"  # whatever fails here is the choice of devices


class UserError(Exception):
    """A mistake outside the program: one line that says what, where and the remedy.

    The command line prints it without a traceback; with `--debug` the traceback follows. It ends with `exit_code`.
    """

    exit_code = 2

    def _render_traceback_(self) -> list[str]:
        """Returns what IPython shows in a notebook, in place of a traceback."""
        return [f"error: {self}"]


def first_line(error: BaseException, limit: int = 200) -> str:
    """Returns the first line of an error's message, or its class where it has none, in at most `limit` characters."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return " ".join(line.split())[:limit]


class StartError(UserError):
    """The machine cannot start the work: devices or memory are missing."""

    exit_code = 3


def as_user_error(error: BaseException) -> UserError | None:
    """Returns an exception, or what caused it, as the error that a user can mend; None for a defect."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        if found := _of_the_machine(error):
            return found
        error = error.__cause__
    return None


def no_devices(error: BaseException) -> StartError:
    """Returns the error for what JAX raised as it looked for devices."""
    asked = os.environ.get("JAX_PLATFORMS")
    why = f"JAX_PLATFORMS={asked} is not there" if isinstance(error, AssertionError) else first_line(error)
    return StartError(f"no devices ({why}); JAX_PLATFORMS=cpu runs on the processor")


def _of_the_machine(error: BaseException) -> UserError | None:
    message, is_jax = first_line(error, 1000), type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    frames = traceback.extract_tb(error.__traceback__)
    if NO_SPACE.search(str(error)):
        return UserError(f"cannot write: {message}; make room there, or choose another place")
    if isinstance(error, OSError) and (error.filename is not None or error.errno in MACHINE):
        return UserError(message)
    if isinstance(error, MemoryError) or (is_jax and NO_MEMORY.search(str(error))):
        return StartError(f"there is too little memory: {message}; make the batch or the model smaller")
    if NO_DEVICE.search(str(error)) or (frames and frames[-1].filename.endswith(JAX_STARTS)):
        return no_devices(error)
    if is_jax and UNSUPPORTED.search(str(error)):
        return StartError(f"the devices cannot do this: {message}; choose another compute_dtype or attention")
    return None
