"""What a pipeline compiles, looked into."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from rflow_jax.generation.pipeline import Pipeline

PRODUCTS = ("dot_general", "conv_general_dilated")


def traced(pipe: Pipeline, *prompts: str, **how: Any) -> dict[str, Any]:
    """The jaxprs of ``prepare`` and ``sample`` as ``pipe.generate`` calls them; nothing is compiled or computed."""
    found: dict[str, Any] = {}

    def only_traced(name: str) -> Any:
        program = getattr(pipe, name)

        def trace(*args: Any) -> Any:
            stage = program.trace(*args)
            found[name] = stage.jaxpr.jaxpr
            return jax.tree.map(lambda out: jnp.ones(out.shape, out.dtype), stage.out_info)

        return trace

    before = pipe.prepare, pipe.sample
    pipe.prepare, pipe.sample = only_traced("prepare"), only_traced("sample")
    try:
        pipe.generate(list(prompts), seeds=range(len(prompts)), **how)
    finally:
        pipe.prepare, pipe.sample = before
    return found


def products(jaxpr: Any) -> Iterator[Any]:
    """Every matrix product and convolution of a jaxpr and of those within it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            yield equation
        for parameter in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr):
            if _is_jaxpr(parameter):
                yield from products(getattr(parameter, "jaxpr", parameter))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "jaxpr") or hasattr(value, "eqns")
