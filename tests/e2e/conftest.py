"""Settings of the tests of command lines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one command has compiled the next ones find, as a user's do, but no earlier run's."""
    shared: Path = tmp_path_factory.getbasetemp().parent / "compiled"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(shared)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
