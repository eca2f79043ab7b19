"""ReflectionFlow in JAX/Flax: the table of contents of the public API.

>>> from rflow_jax import load_pipeline
>>> pipe = load_pipeline("FLUX.1-dev", lora="corrector")
>>> images = pipe.generate(["a photo of a bench"], seeds=[0], conditions=[bad], reflections=["Add a second bench."])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rflow_jax.errors import InputError
    from rflow_jax.generation.config import SamplingConfig
    from rflow_jax.generation.pipeline import Pipeline, load_pipeline

_HOMES = {
    "InputError": "rflow_jax.errors",
    "Pipeline": "rflow_jax.generation.pipeline",
    "SamplingConfig": "rflow_jax.generation.config",
    "load_pipeline": "rflow_jax.generation.pipeline",
}
__all__ = ["InputError", "Pipeline", "SamplingConfig", "load_pipeline"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: a command line's --help need not wait for JAX.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
