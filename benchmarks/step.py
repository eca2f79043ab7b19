"""Milliseconds of one denoising step on this machine's accelerator, with random weights made on the device.

    python -m benchmarks.step [--size dev|tiny] [--batch 1 4] [--repeats 5] [--scan_blocks] [--profile]

Prints a table: batch, condition, milliseconds a step (median), TFLOP/s, device memory. The figures to
hold it against stand in docs/performance.md.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rflow_jax.flow import euler, rope_for
from rflow_jax.generation.sampling import Conditioning, DynamicArgs, StaticArgs, velocity_of
from rflow_jax.models.flux.config import ConditionFlags, FluxConfig, forward_flops
from rflow_jax.models.flux.transformer import FluxGraph, abstract_flux
from rflow_jax.models.lora import attach_shapes, linears, select
from rflow_jax.models.options import CORRECTOR_TARGET_MODULES

TINY = FluxConfig(
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    pooled_projection_dim=16,
    axes_dims_rope=(4, 6, 6),
)
# (configuration, image side, condition side, text tokens)
SIZES = {"dev": (FluxConfig(), 1024, 512, 512), "tiny": (TINY, 64, 32, 16)}
TOKEN_PIXELS = 16
LORA_RANK = 32
STEPS_A_CALL = 5


def random_network(config: FluxConfig, dtype: jnp.dtype, *, scan_blocks: bool = False) -> tuple[FluxGraph, nnx.State]:
    """A transformer with a corrector LoRA; every leaf drawn on the device."""
    network = abstract_flux(config, dtype)
    attach_shapes(network, dict.fromkeys(select(linears(network), CORRECTOR_TARGET_MODULES), LORA_RANK), dtype=dtype)
    graph = FluxGraph.of(network, scan_blocks=scan_blocks)
    state = jax.eval_shape(graph.stacked, nnx.state(network))

    @partial(jax.jit, static_argnums=(1, 2))
    def draw(key, shape, dtype):
        return jax.random.normal(key, shape, dtype) * (shape[-2:][0] ** -0.5 if shape else 1)

    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return graph, tree.unflatten([draw(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)])


def grid(side: int) -> tuple[int, int]:
    """Rows and columns of the tokens of a square picture."""
    return side // TOKEN_PIXELS, side // TOKEN_PIXELS


def step_function(graph: FluxGraph, config: FluxConfig, text: int, side: int, condition_side: int | None):
    """A jitted function of (state, x, text, pooled, condition) that takes a few Euler steps."""
    rope = rope_for(config, text, grid(side), grid(condition_side) if condition_side else None)

    @partial(jax.jit, donate_argnums=1)
    def steps(state, x, text, pooled, condition):
        network = graph.merge(state)
        times = jnp.linspace(1.0, 0.0, STEPS_A_CALL + 1)
        flags = ConditionFlags()
        program = StaticArgs(side, side, condition_side, TOKEN_PIXELS, flags, False, False)
        given = Conditioning(text, pooled, condition, None)
        scales = DynamicArgs(times, jnp.float32(3.5), jnp.float32(1.0), jnp.float32(1.0))
        return euler(velocity_of(network, text.dtype, program, given, scales, rope), x, times)[0]

    return steps


def measure(
    graph, state, config, sizes, batch: int, with_condition: bool, repeats: int, profile: bool
) -> dict[str, float]:
    """Median and spread of the time of one step."""
    side, condition_side, text = sizes
    image, c = (side // TOKEN_PIXELS) ** 2, (condition_side // TOKEN_PIXELS) ** 2 if with_condition else 0
    dtype = jax.tree.leaves(state)[0].dtype
    keys = jax.random.split(jax.random.key(1), 4)
    x = jax.random.normal(keys[0], (batch, image, config.in_channels))
    t5 = jax.random.normal(keys[1], (batch, text, config.joint_attention_dim), dtype)
    pooled = jax.random.normal(keys[2], (batch, config.pooled_projection_dim), dtype)
    condition = jax.random.normal(keys[3], (batch, c, config.in_channels), dtype) if c else None
    steps = step_function(graph, config, text, side, condition_side if c else None)
    begin = time.perf_counter()
    x = steps(state, x, t5, pooled, condition).block_until_ready()
    compiled = time.perf_counter() - begin
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        x = steps(state, x, t5, pooled, condition).block_until_ready()
        times.append((time.perf_counter() - begin) / STEPS_A_CALL)
    if profile:
        print_kernels(lambda: steps(state, jnp.array(x), t5, pooled, condition).block_until_ready())
    if not np.isfinite(np.asarray(x)).all():
        raise SystemExit("not finite: the figures would mean nothing")
    seconds = statistics.median(times)
    flops = batch * forward_flops(config, text=text, image=image, condition=c)
    return {
        "ms": seconds * 1e3,
        "spread": (max(times) - min(times)) * 1e3,
        "tflops": flops / seconds / 1e12,
        "first_s": compiled,
        "gib": _peak_gib(),
    }


def print_kernels(run, most: int = 25) -> None:
    """Where the device's time goes in one call of ``run``: the longest kernels, summed by name."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
    totals: dict[str, list[float]] = {}
    for plane in profile.planes:
        for line in plane.lines if "GPU" in plane.name else ():
            for event in line.events if line.name.startswith("Stream") else ():
                name = re.sub(r"_\d+$", "", event.name)
                totals.setdefault(name, []).append(event.duration_ns / 1e6)
    print(f"kernels: {sum(map(sum, totals.values())) / STEPS_A_CALL:.1f} ms a step")
    for name, times in sorted(totals.items(), key=lambda item: -sum(item[1]))[:most]:
        print(f"{sum(times) / STEPS_A_CALL:8.2f} ms {len(times) // STEPS_A_CALL:5d} x  {name[:110]}")


def _peak_gib() -> float:
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", 0) / 2**30


def main() -> None:
    """Measures every combination and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="dev")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--condition", choices=("yes", "no", "both"), default="both")
    parser.add_argument("--scan_blocks", action="store_true", help="with stacked blocks")
    parser.add_argument("--profile", action="store_true", help="also print the longest kernels")
    arguments = parser.parse_args()
    config, *sizes = SIZES[arguments.size]
    graph, state = random_network(config, jnp.bfloat16, scan_blocks=arguments.scan_blocks)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print("batch condition  ms/step  ms/image-step  spread  TFLOP/s  first call s  peak GiB")
    for batch in arguments.batch:
        for with_condition in {"yes": (True,), "no": (False,), "both": (False, True)}[arguments.condition]:
            row = measure(graph, state, config, sizes, batch, with_condition, arguments.repeats, arguments.profile)
            print(
                f"{batch:5d} {'yes' if with_condition else 'no':9s} {row['ms']:8.1f} {row['ms'] / batch:14.1f} "
                f"{row['spread']:7.2f} {row['tflops']:8.0f} {row['first_s']:13.1f} {row['gib']:9.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
