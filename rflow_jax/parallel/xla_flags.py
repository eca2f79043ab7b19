"""Flags of XLA, which it reads once, when JAX first looks for devices."""

from __future__ import annotations

import os
import pkgutil
from importlib.util import find_spec

_CUDA_GRAPHS = "--xla_gpu_enable_command_buffer"


def disable_cuda_graphs() -> None:
    """Keeps XLA from recording CUDA graphs, for programs that run from several threads of this process.

    While one thread records, what another thread starts on the same GPU ends up in the record or is refused: the
    process fails ("capturing stream has unjoined work"), crashes or hangs. A value of the flag in ``$XLA_FLAGS`` stays.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _has_cuda() and _CUDA_GRAPHS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_CUDA_GRAPHS}=".strip()


def _has_cuda() -> bool:
    """Whether JAX's plugin for CUDA is installed; nothing is loaded."""
    plugins = find_spec("jax_plugins")
    places = plugins.submodule_search_locations if plugins else None
    return any(module.name.startswith("xla_cuda") for module in pkgutil.iter_modules(places or []))
