"""ReflectionFlow in JAX/Flax: the table of contents of the public API.

>>> from rflow_jax import load_pipeline
>>> pipe = load_pipeline("FLUX.1-dev", lora="corrector")
>>> images = pipe.generate(["a photo of a bench"], seeds=[0], conditions=[bad], reflections=["Add a second bench."])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rflow_jax.errors import InputError, RunError
    from rflow_jax.generation.config import SamplingConfig
    from rflow_jax.generation.pipeline import Pipeline, load_pipeline
    from rflow_jax.verifiers import make_verifier
    from rflow_jax.verifiers.base import Verdict, Verifier
    from rflow_jax.weights.lora.export import export_lora
    from rflow_jax.weights.lora.read import read_lora

_HOMES = {
    "InputError": "rflow_jax.errors",
    "Pipeline": "rflow_jax.generation.pipeline",
    "RunError": "rflow_jax.errors",
    "SamplingConfig": "rflow_jax.generation.config",
    "Verdict": "rflow_jax.verifiers.base",
    "Verifier": "rflow_jax.verifiers.base",
    "export_lora": "rflow_jax.weights.lora.export",
    "load_pipeline": "rflow_jax.generation.pipeline",
    "make_verifier": "rflow_jax.verifiers",
    "read_lora": "rflow_jax.weights.lora.read",
}
__all__ = [
    "InputError",
    "Pipeline",
    "RunError",
    "SamplingConfig",
    "Verdict",
    "Verifier",
    "export_lora",
    "load_pipeline",
    "make_verifier",
    "read_lora",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    # Imported when asked for: a command line's --help need not wait for JAX.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
