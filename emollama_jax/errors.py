"""The one exception for mistakes a user can mend."""


class UserError(Exception):
    """A mistake outside the program: one line that says what, where and the remedy.

    The command line prints it without a traceback; with `--debug` the traceback follows. It ends with `exit_code`.
    """

    exit_code = 2
