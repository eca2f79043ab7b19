"""The one exception a user is meant to read."""


class InputError(ValueError):
    """Bad input: one line that says what, where and what to do.

    The command lines print the message without a traceback and exit with status 2. Library callers can
    catch it as a ``ValueError``.
    """
