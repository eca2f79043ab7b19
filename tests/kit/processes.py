"""Commands in processes of their own, which begin with everything imported.

Importing JAX, Flax, Orbax and Transformers takes most of a short command's time. Python's ``forkserver`` imports them
once; every command is forked from it, with an environment, output, exit status and signals of its own.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.kit.preload"])


def xla_flags(devices: int = 1) -> str:
    """``XLA_FLAGS`` of a process with this number of CPU devices; it compiles as quickly as this one."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"


class Process:
    """A script of the repository, with arguments, running as ``python SCRIPT ARGUMENTS``; used as ``subprocess.Popen``.

    Args:
        argv: the script's path in the repository, and its arguments.
        environment: variables to set; ``XLA_FLAGS`` are those of one CPU device unless given.
        merged: what it writes to stderr is in its stdout.
    """

    def __init__(
        self, argv: Sequence[object], environment: Mapping[str, str] = {}, *, merged: bool = False, cwd: Path = ROOT
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        out, errors = (Path(self._folder.name) / name for name in ("stdout", "stderr"))
        self._files = (out, out if merged else errors)
        for file in self._files:
            file.touch()
        self.args = [str(ROOT / str(argv[0])), *map(str, argv[1:])]
        variables = {**os.environ, "XLA_FLAGS": xla_flags(), **environment}
        self._process = FORKS.Process(target=_become, args=(self.args, variables, self._files, str(cwd)))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """The exit status; None while it runs, negative if a signal ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self._process.pid or 0, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for its end; returns what it wrote to stdout and stderr."""
        self._process.join(timeout)
        out, errors = (file.read_text() for file in self._files)
        if self.returncode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self.args, timeout or 0, out, errors)
        return out, errors


def run(argv: Sequence[object], environment: Mapping[str, str] = {}, **how) -> subprocess.CompletedProcess[str]:
    """Runs a script to its end; see :class:`Process`."""
    process = Process(argv, environment, **how)
    out, errors = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode or 0, out, errors)


def _become(argv: list[str], environment: dict[str, str], files: tuple[Path, Path], cwd: str) -> None:
    """The forked process: it takes on what differs from the one it was forked from, and runs the script."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, file in enumerate(files, start=1):
        opened = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a forked process ends without them
