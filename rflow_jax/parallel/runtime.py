"""Settings of the JAX runtime that every program of this package wants."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that the next start does not compile again.

    In ``$JAX_COMPILATION_CACHE_DIR`` if that (or JAX's own setting) names a folder, else in
    ``$XDG_CACHE_HOME/rflow_jax`` (``~/.cache/rflow_jax``).
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "rflow_jax" / "compiled"))
