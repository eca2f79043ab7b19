"""Milliseconds and memory of one training step on this machine's accelerator, with random weights and encoded samples.

    python -m benchmarks.train_step [--size dev|tiny] [--batch 1 2 4] [--remat dots full] [--repeats 5] [--profile]

A rank-32 LoRA in float32 on a bfloat16 base, Prodigy, a condition; encoding pictures and texts is not included. Prints
a table: batch, remat, milliseconds a step and a sample, model TFLOP/s (two forward passes' worth), seconds of the first
call, the device memory taken at most by this row or one before it: ask for one row where memory is the question.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.step import SIZES, STEPS_A_CALL, TOKEN_PIXELS, print_kernels, random_network
from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.flux.cost import forward_flops
from rflow_jax.parallel.mesh import MeshConfig, make_mesh, put_batch, replicated
from rflow_jax.training.objective import Examples
from rflow_jax.training.optimizers import OptimizerConfig, make_optimizer
from rflow_jax.training.step import Recipe, Shape, init_state, make_step

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


def encoded(config: FluxConfig, batch: int, shape: Shape) -> Examples:
    """Random samples as the encoders would give them."""
    keys = jax.random.split(jax.random.key(1), 4)
    image, condition = (rows * columns for rows, columns in (shape.image, shape.condition))
    return Examples(
        jax.random.normal(keys[0], (batch, image, config.in_channels)),
        jax.random.normal(keys[1], (batch, condition, config.in_channels), jnp.bfloat16),
        jax.random.normal(keys[2], (batch, shape.text, config.joint_attention_dim), jnp.bfloat16),
        jax.random.normal(keys[3], (batch, config.pooled_projection_dim), jnp.bfloat16),
    )


def measure(graph, trainable, frozen, config, sizes, batch: int, remat: str, repeats: int, profile: bool) -> str:
    """One row of the table."""
    side, condition_side, text = sizes
    shape = Shape(text, (side // TOKEN_PIXELS,) * 2, (condition_side // TOKEN_PIXELS,) * 2)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(OptimizerConfig())
    recipe = Recipe(0, jnp.bfloat16, shape, remat=remat)
    state, shardings = init_state(jax.device_put(jax.tree.map(jnp.copy, trainable), replicated(mesh)), optimizer, mesh)
    step = make_step(graph, config, optimizer, recipe, mesh, shardings)
    examples = put_batch(mesh, jax.device_get(encoded(config, batch, shape)))
    numbers = put_batch(mesh, np.arange(batch, dtype=np.uint32))
    begin = time.perf_counter()
    state, report = step(state, frozen, examples, numbers)
    losses, moments = [float(report.loss)], [time.perf_counter()]
    first = moments[0] - begin
    state, told = step(state, frozen, examples, numbers)
    for _ in range(repeats):  # as in training, a step's loss is read once the next step is under way
        state, report = step(state, frozen, examples, numbers)
        losses.append(float(told.loss))
        moments.append(time.perf_counter())
        told = report
    if profile:

        def few() -> None:
            nonlocal state
            for _ in range(STEPS_A_CALL):
                state, report = step(state, frozen, examples, numbers)
            report.loss.block_until_ready()

        print_kernels(few)
    if not np.isfinite(losses).all():
        raise SystemExit("not finite: the figures would mean nothing")
    seconds = statistics.median(np.diff(moments))
    tokens = {"text": text, "image": shape.image[0] ** 2, "condition": shape.condition[0] ** 2}
    flops = 2 * batch * forward_flops(config, **tokens)
    stats = jax.devices()[0].memory_stats() or {}
    return (
        f"{batch:5d} {remat:6s} {seconds * 1e3:9.1f} {seconds * 1e3 / batch:10.1f} {flops / seconds / 1e12:8.0f} "
        f"{first:13.1f} {stats.get('peak_bytes_in_use', 0) / 2**30:9.1f}  {losses[0]:.4f} -> {losses[-1]:.4f}"
    )


def main() -> None:
    """Measures every combination, the smallest first; one that does not fit is said and left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="dev")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--remat", nargs="+", default=["full", "dots"], choices=("none", "dots", "full"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="also print the longest kernels")
    arguments = parser.parse_args()
    config, *sizes = SIZES[arguments.size]
    graph, state = random_network(config, jnp.bfloat16)
    _, trainable, frozen = nnx.split(nnx.merge(graph, state), nnx.LoRAParam, ...)
    trainable = jax.tree.map(lambda x: x.astype(jnp.float32) * 0.01, trainable)
    graph, _, _ = nnx.split(nnx.merge(graph, state), nnx.LoRAParam, ...)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print("batch remat    ms/step  ms/sample  TFLOP/s  first call s  peak GiB  loss")
    for remat in arguments.remat:
        for batch in arguments.batch:
            try:
                how = batch, remat, arguments.repeats, arguments.profile
                row = measure(graph, trainable, frozen, config, sizes, *how)
            except jax.errors.JaxRuntimeError as error:
                if OUT_OF_MEMORY not in str(error):
                    raise
                row = f"{batch:5d} {remat:6s} does not fit"
            print(row, flush=True)


if __name__ == "__main__":
    main()
