"""The exceptions a user is meant to read."""


class InputError(ValueError):
    """Bad input: one line that says what, where and what to do.

    The command lines print the message without a traceback and exit with status 2. Library callers can
    catch it as a ``ValueError``.
    """


class RunError(RuntimeError):
    """A run that cannot continue, although its input is valid: one line that says why and what is saved.

    The command lines print the message without a traceback and exit with status 1.
    """


class ServiceError(RunError):
    """A service that refuses every request, or has been away for too long: nothing is known of what was asked."""
