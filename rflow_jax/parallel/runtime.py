"""Settings of the JAX runtime for every program of this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from rflow_jax.utils.cache import cache_folder


@contextmanager
def reproducible(dtype: Dtype) -> Iterator[None]:
    """Makes the numbers of a program called (and so traced) inside depend on its code only, not on JAX's settings.

    Products of float32 stay float32, which a GPU would otherwise round to TensorFloat-32 and a TPU to bfloat16; random
    bits are those of ``jax_threefry_partitionable``, JAX's default, even where that is switched off.
    """
    precision = jax.default_matmul_precision("highest") if jnp.dtype(dtype) == jnp.float32 else nullcontext()
    with precision, jax.threefry_partitionable(True):
        yield


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that the next start does not compile again.

    In ``$JAX_COMPILATION_CACHE_DIR`` if that (or JAX's own setting) names a folder, else in
    ``$XDG_CACHE_HOME/rflow_jax`` (``~/.cache/rflow_jax``).
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("compiled")))
