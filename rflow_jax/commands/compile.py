"""``rflow compile``: does a recipe fit a TPU topology? Compiled for it on this machine's CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rflow_jax.aot.chips import require_libtpu
from rflow_jax.aot.config import CompileConfig, command_for
from rflow_jax.errors import InputError, RunError
from rflow_jax.utils.cli import Command

CHILD = "rflow_jax.aot.report"
_LEAST_EFFORT = "-1.0"
_TAIL = 30


def command(name: str, argv: Sequence[str]) -> Command:
    """The command for the kind of recipe that the words name: checked in this process, compiled in a child."""
    return command_for(argv, lambda config, recipe: _compile(config, argv))


def _compile(config: CompileConfig, words: Sequence[str]) -> int:
    """Compiles in a process of its own; returns the exit status."""
    require_libtpu()
    if config.json is not None and (Path(config.json).is_dir() or not Path(config.json).parent.is_dir()):
        raise InputError(f"json {config.json}: give a file in a folder that is there")
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.run(
            [sys.executable, "-m", CHILD, *words], env=_environment(config.effort), stderr=said, check=False
        )
        said.seek(0)
        lines = said.read().splitlines()
    if child.returncode in (0, 1) and not any(line.startswith("Traceback") for line in lines):
        for warning in dict.fromkeys(line for line in lines if line.startswith("warning: ")):
            print(warning, file=sys.stderr)
        return child.returncode
    # libtpu says much besides; a line of ours is what counts.
    if ours := next((line for line in lines if line.startswith("error: ")), None):
        raise InputError(ours.removeprefix("error: "))
    print(*lines[-_TAIL:], sep="\n", file=sys.stderr)
    raise RunError(f"the compiler ended with status {child.returncode}; its last lines are above")


def _environment(effort: str) -> dict[str, str]:
    """Of a process that compiles for TPUs and has none."""
    own = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if effort == "least":
        own["JAX_EXEC_TIME_OPTIMIZATION_EFFORT"] = _LEAST_EFFORT
    # What was compiled for another purpose must not be counted, and fake devices only take time to make.
    dropped = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")
    return {key: value for key, value in os.environ.items() if key not in dropped} | own
