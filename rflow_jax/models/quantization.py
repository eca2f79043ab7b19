"""Linears with 8-bit kernels: half the memory of bfloat16, and half the bytes read per generated token.

Weights alone: activations stay as they are, and products are summed in float32.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from rflow_jax.errors import InputError
from rflow_jax.models.lora import linears

Model = TypeVar("Model", bound=nnx.Module)
Quantization = Literal["int8", "fp8"]
_TYPES: dict[str, Any] = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def quantize(model: Model, kind: Quantization | None, pattern: str = r".*") -> Model:
    """Quantizes the kernels of linears, a scale for each output, one after the other; returns the model.

    Args:
        kind: ``int8`` or ``fp8`` (e4m3); None leaves the model as it is.
        pattern: regular expression on the dotted paths of the linears.

    Raises:
        InputError: ``qwix`` is not installed, or no linear has such a path.
    """
    if kind is None:
        return model
    chosen = [linear for path, linear in linears(model).items() if re.fullmatch(pattern, path)]
    if not chosen:
        raise InputError(f"quantization: no linear of this network matches {pattern!r}")
    try:
        import qwix
    except ImportError as error:
        raise InputError(f"quantization: {kind} needs qwix (pip install 'rflow_jax[quantized]')") from error
    reduce = jax.jit(partial(qwix.quantize, qtype=_TYPES[kind], channelwise_axes=(1,), scale_dtype=jnp.float32))
    for linear in chosen:
        linear.kernel.set_value(reduce(linear.kernel.get_value()))
    return model
