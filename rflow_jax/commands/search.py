"""``rflow noise``, ``noise-prompt`` and ``reflect``: a search over images of many prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from rflow_jax.search.config import RECIPE, Kind, RunConfig, SearchConfig
from rflow_jax.utils.cli import Command


def command(name: str, argv: Sequence[str]) -> Command:
    """The search of this name."""
    return Command((SearchConfig, RunConfig), lambda config, run: _search(cast(Kind, name), config, run), recipe=RECIPE)


def _search(kind: Kind, config: SearchConfig, run: RunConfig) -> int:
    from rflow_jax.search.run import search  # imports JAX, for which --help need not wait

    return search(kind, config, run)
