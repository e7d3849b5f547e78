"""What the background threads of libraries report, while a verb is at work.

Orbax logs every failed write, with its traceback, from each thread that meets it, and raises it again where the writing
is waited for. TensorStore prints what became of callbacks that nobody waits for any more.
"""

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from emollama_jax.errors import as_user_error

LATE = "Event loop is closed"  # a callback of writing that ended in an error before


@contextlib.contextmanager
def background_reports_held(*, ends_process: bool) -> Iterator[None]:
    """Within the block, background threads print nothing of errors that a user can mend.

    Where the block ends by such an error, which is to be printed as one line, that line is all. Where it ends
    otherwise, what was held back is printed then.

    Args:
        ends_process: whether the process is about to end after an error of the block. Threads that still run then
            stay as quiet.
    """
    import absl.logging  # makes the logger, which is of a class of its own

    held: list[Callable[[], None]] = []
    logger = absl.logging.get_absl_logger()
    hooks = threading.excepthook, sys.unraisablehook

    def is_printed(record: logging.LogRecord) -> bool:
        if not (record.exc_info and _is_known(record.exc_info[1])):
            return True
        held.append(lambda: logger.handle(record))
        return False

    def hold_or_print(report: Any, hook: Callable[[Any], object]) -> None:
        if _is_known(report.exc_value):
            held.append(lambda: hook(report))
        else:
            hook(report)

    logger.addFilter(is_printed)
    threading.excepthook = lambda report: hold_or_print(report, hooks[0])
    sys.unraisablehook = lambda report: hold_or_print(report, hooks[1])
    is_told = False
    try:
        yield
    except Exception as error:
        is_told = as_user_error(error) is not None
        raise
    finally:
        if not (is_told and ends_process):
            logger.removeFilter(is_printed)
            threading.excepthook, sys.unraisablehook = hooks
        for print_it in () if is_told else held:
            print_it()


def _is_known(error: BaseException | None) -> bool:
    return as_user_error(error) is not None or (isinstance(error, RuntimeError) and str(error) == LATE)
