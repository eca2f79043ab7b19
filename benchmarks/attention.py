"""The accelerator's attention against the float32 reference, at FLUX.1-dev's shapes: error and time.

python -m benchmarks.attention [--tokens 4608 5632] [--batch 1] [--heads 24] [--head_dim 128]
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp

from rflow_jax.models.attention import attend

REPEATS = 20


def inputs(batch: int, tokens: int, heads: int, head_dim: int) -> list[jax.Array]:
    """Queries, keys and values as FLUX's norms leave them: of size 1."""
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (batch, tokens, heads, head_dim), jnp.bfloat16) for key in keys]


@jax.jit
def reference(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """In float32, a head at a time to bound memory."""

    def head(qkv: tuple[jax.Array, ...]) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return attend(*(x[:, :, None].astype(jnp.float32) for x in qkv), impl="reference")[:, :, 0]

    heads_first = tuple(jnp.moveaxis(x, 2, 0) for x in (q, k, v))
    return jnp.moveaxis(jax.lax.map(head, heads_first), 0, 2)


def main() -> None:
    """Prints one line for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4608, 5632])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--head_dim", type=int, default=128)
    arguments = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, bfloat16")
    for tokens in arguments.tokens:
        q, k, v = inputs(arguments.batch, tokens, arguments.heads, arguments.head_dim)
        exact = reference(q, k, v)
        fast = jax.jit(partial(attend, impl="auto"))
        last = fast(q, k, v)
        out = last.astype(jnp.float32)
        # Rounding the exact result to bfloat16 is the least error that any implementation can have.
        least = exact.astype(jnp.bfloat16).astype(jnp.float32) - exact
        begin = time.perf_counter()
        for _ in range(REPEATS):
            last = fast(q, k, v)
        last.block_until_ready()
        seconds = (time.perf_counter() - begin) / REPEATS
        print(
            f"{tokens} tokens: {seconds * 1e3:.3f} ms, relative error {norm(out - exact) / norm(exact):.2e} "
            f"(rounding alone {norm(least) / norm(exact):.2e}), largest {float(jnp.abs(out - exact).max()):.2e} of "
            f"{float(jnp.abs(exact).max()):.2e}",
            flush=True,
        )


def norm(x: jax.Array) -> float:
    return float(jnp.linalg.norm(x.astype(jnp.float32).ravel()))


if __name__ == "__main__":
    main()
