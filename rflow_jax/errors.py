"""The exceptions a user is meant to read."""

from collections.abc import Iterator
from contextlib import contextmanager


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


@contextmanager
def serving(role: str) -> Iterator[None]:
    """Names the role of a service, such as ``verifier``, at the beginning of each ServiceError's message."""
    try:
        yield
    except ServiceError as error:
        raise ServiceError(f"{role}: {error}") from None
