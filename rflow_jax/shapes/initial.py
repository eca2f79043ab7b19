"""First values of networks that are trained from nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from zlib import crc32

import jax.numpy as jnp
import numpy as np
from flax import nnx

from rflow_jax.weights.loading import parameter_variables


def draw_parameters(network: nnx.Module, seed: int, *, prefix: str, factors: Mapping[str, float]) -> None:
    """Gives an abstract network float32 parameters: normal numbers, kernels by LeCun's rule.

    Drawn by NumPy: with JAX every shape would be compiled, which takes longer than all else. The same seed gives every
    parameter its own numbers.

    Args:
        prefix: before the dotted path of a parameter.
        factors: regular expressions on prefix and path -> what the numbers are multiplied with.
    """
    for path, variable in parameter_variables(network).items():
        name, shape = prefix + path, tuple(variable.shape)
        if path.endswith((".bias", ".scale")):
            variable.set_value(jnp.full(shape, float(path.endswith(".scale"))))
            continue
        numbers = np.random.default_rng([seed, crc32(name.encode())]).standard_normal(shape, np.float32)
        fan_in = math.prod(shape[:-1]) if path.endswith(".kernel") else 1
        factor = next((factor for pattern, factor in factors.items() if re.fullmatch(pattern, name)), 1.0)
        variable.set_value(jnp.asarray(numbers * np.float32(factor * fan_in**-0.5)))
