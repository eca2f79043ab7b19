"""A job for worker processes."""

import sys


def is_loaded(name: str) -> bool:
    """Whether this process has imported a module."""
    return name in sys.modules
