"""The exceptions a user is meant to read."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


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


_ROLE: ContextVar[str] = ContextVar("role", default="a service")


def served_role() -> str:
    """The role of the service that is being asked or made, such as ``verifier``."""
    return _ROLE.get()


@contextmanager
def serving(role: str, *, settings: bool = False) -> Iterator[None]:
    """Names the role of a service, such as ``verifier``, at the beginning of each ServiceError's message.

    Args:
        settings: also of each InputError's, while the service is made from its settings.
    """
    before = _ROLE.set(role)
    try:
        yield
    except ServiceError as error:
        raise ServiceError(f"{role}: {error}") from None
    except InputError as error:
        if settings and not str(error).startswith(role):
            raise InputError(f"{role}: {error}") from error
        raise
    finally:
        _ROLE.reset(before)
