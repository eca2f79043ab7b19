"""``rflow configs``: lists the recipes of the package."""

from __future__ import annotations

from collections.abc import Sequence

from rflow_jax.utils.cli import Command
from rflow_jax.utils.recipes import CONFIGS


def command(name: str, argv: Sequence[str]) -> Command:
    """The list."""
    return Command((), list_configs)


def list_configs() -> None:
    """Prints each recipe's name, for ``--config NAME``, and the first line of its comment."""
    files = sorted(CONFIGS.glob("*.yaml"))
    width = max(len(file.stem) for file in files)
    for file in files:
        print(f"{file.stem:<{width}}  {file.read_text(encoding='utf-8').partition(chr(10))[0].lstrip('# ')}")
