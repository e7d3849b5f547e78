"""The exception for mistakes that a user can mend, and errors in one line."""


class UserError(Exception):
    """A mistake outside the program: one line that says what, where and the remedy.

    The command line prints it without a traceback; with `--debug` the traceback follows. It ends with `exit_code`.
    """

    exit_code = 2


def first_line(error: BaseException, limit: int = 200) -> str:
    """Returns the first line of an error's message, or its class where it has none, in at most `limit` characters."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return " ".join(line.split())[:limit]
