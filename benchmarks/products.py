"""Rates of the products of one FLUX block in the arrangements that a program may choose from. One GPU, a minute.

    python -m benchmarks.products [--width 3072] [--rows 4608 5632] [--calls 40]

Prints milliseconds and TFLOP/s of each, and the kernels that the compiler made of it. XLA_FLAGS decide which epilogues
are fused (see ``FLAGS`` in :mod:`benchmarks.step`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernels import epilogues

RANK = 32
FP8 = jnp.float8_e4m3fn
gelu = partial(jax.nn.gelu, approximate=True)


def in_fp8(x: Any, kernel: Any, x_scale: Any, kernel_scale: Any) -> Any:
    """x @ kernel.T in 8 bits: rounding x is left to the kernel that makes it; written as the compiler looks for it."""
    rounded = jnp.clip(x.astype(jnp.float32) / x_scale, -448, 448).astype(FP8)
    return jax.lax.dot_general(
        rounded.astype(jnp.bfloat16) * x_scale.astype(jnp.bfloat16),
        kernel.astype(jnp.bfloat16) * kernel_scale.astype(jnp.bfloat16),
        (((1,), (1,)), ((), ())),
    )


def arrangements(rows: int, d: int) -> dict[str, tuple[float, Callable[..., Any], tuple[Any, ...]]]:
    """Name -> products of d x d a row, function, arguments."""

    def draw(*shape: int) -> Any:
        return jax.random.normal(jax.random.key(0), shape, jnp.bfloat16) * 0.05

    x, attended, hidden = draw(rows, d), draw(rows, d), draw(rows, 4 * d)
    w, w2, w3, w4, w_in = draw(d, d), draw(d, 2 * d), draw(d, 3 * d), draw(d, 4 * d), draw(d, 7 * d)
    bias, w_out = draw(4 * d), draw(5 * d, d)
    first, second = draw(d, d), draw(4 * d, d)
    start, a, b = rows - rows // 5, draw(d, RANK), draw(RANK, 4 * d)
    one = jnp.float32(0.01)
    w8, wide8 = draw(d, d).astype(FP8), draw(4 * d, d).astype(FP8)

    def by_update(x: Any, w: Any, bias: Any, a: Any, b: Any) -> Any:
        y = x @ w + bias
        return gelu(jax.lax.dynamic_update_slice(y, y[start:] + (x[start:] @ a) @ b, (start, 0)))

    def by_padding(x: Any, w: Any, bias: Any, a: Any, b: Any) -> Any:
        return gelu(x @ w + bias + jnp.pad((x[start:] @ a) @ b, ((start, 0), (0, 0))))

    return {
        "q, k, v": (3, lambda x, a, b, c: (x @ a, x @ b, x @ c), (x, w, w + 1, w + 2)),
        "q with k, v": (3, lambda x, a, b: (x @ a, x @ b), (x, w2, w)),
        "q with k with v": (3, lambda x, a: x @ a, (x, w3)),
        "q with k with v, each copied out": (3, lambda x, a: tuple(jnp.split(x @ a, 3, axis=1)), (x, w3)),
        "q, k, v, mlp in one": (7, lambda x, a: x @ a, (x, w_in)),
        "mlp": (4, lambda x, a: x @ a, (x, w4)),
        "gelu(mlp + bias)": (4, lambda x, a, b: gelu(x @ a + b), (x, w4, bias)),
        "gelu(mlp + bias + LoRA), updated in place": (4, by_update, (x, w4, bias, a, b)),
        "gelu(mlp + bias + LoRA), padded": (4, by_padding, (x, w4, bias, a, b)),
        "out, joined": (5, lambda y, h, w: jnp.concatenate([y, h], 1) @ w, (attended, hidden, w_out)),
        "out, two products": (5, lambda y, h, a, b: y @ a + h @ b, (attended, hidden, first, second)),
        "fp8 q, rounded in place": (1, in_fp8, (x, w8, one, one)),
        "fp8 gelu(mlp + bias)": (4, lambda x, w, s, t, b: gelu(in_fp8(x, w, s, t) + b), (x, wide8, one, one, bias)),
    }


def main() -> None:
    """Measures every arrangement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--rows", type=int, nargs="+", default=[4608, 5632])
    parser.add_argument("--calls", type=int, default=40)
    arguments = parser.parse_args()
    for rows in arguments.rows:
        for name, (products, function, given) in arrangements(rows, arguments.width).items():
            compiled = jax.jit(function).lower(*given).compile()
            jax.block_until_ready(compiled(*given))
            best = float("inf")
            for _ in range(3):
                begin = time.perf_counter()
                jax.block_until_ready([compiled(*given) for _ in range(arguments.calls)][-1])
                best = min(best, (time.perf_counter() - begin) / arguments.calls)
            rate = 2.0 * rows * arguments.width**2 * products / best / 1e12
            print(f"{rows} {name:44s} {best * 1e3:8.3f} ms {rate:7.0f} TFLOP/s  {epilogues(compiled)}", flush=True)


if __name__ == "__main__":
    main()
