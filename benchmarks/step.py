"""Milliseconds of one denoising step on this machine's accelerator, with random weights made on the device.

    python -m benchmarks.step [--size dev|part|tiny] [--batch 1 4] [--repeats 5] [--flags default epilogues ...]
        [--kernels split whole] [--scan_blocks] [--peer] [--profile]

Prints a table: variant, batch, condition, milliseconds a step (median), TFLOP/s, device memory. The figures to hold it
against stand in docs/performance.md. ``--flags`` runs one process for each of these sets of XLA's flags; ``--peer``
adds diffusers, eager and compiled (:mod:`benchmarks.step_torch`). The size ``part`` has 4 + 8 of the 19 + 38 blocks at
full width, which compiles in a fifth of the time: for comparing variants.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.kernels import epilogues, print_kernels
from rflow_jax.flow import euler, rope_for
from rflow_jax.generation.sampling import Conditioning, DynamicArgs, StaticArgs, velocity_of
from rflow_jax.models.flux.config import ConditionFlags, FluxConfig, forward_flops
from rflow_jax.models.flux.split import split_kernels
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
SIZES = {
    "dev": (FluxConfig(), 1024, 512, 512),
    "part": (FluxConfig(num_layers=4, num_single_layers=8), 1024, 512, 512),
    "tiny": (TINY, 64, 32, 16),
}
_LT = "--xla_gpu_enable_cublaslt=true"
_CUBLAS = "--xla_gpu_enable_triton_gemm=false"
_NO_MERGE = "--xla_gpu_dot_merger_threshold_mb=0"
_ALL = f"{_LT} {_CUBLAS} {_NO_MERGE}"
# Sets of XLA's flags by name; all of them exist in JAX 0.10.2 and 0.11.2.
FLAGS = {
    "default": "",
    "cublaslt": _LT,
    "no_triton": _CUBLAS,
    "no_merge": _NO_MERGE,
    "epilogues": f"{_LT} {_CUBLAS}",
    "epilogues_no_merge": _ALL,
    "cudnn_gemm": f"{_LT} --xla_gpu_cudnn_gemm_fusion_level=2",
    "slices": f"{_ALL} --xla_gpu_enable_dynamic_slice_fusion=true",
    "top_k": f"{_ALL} --xla_gpu_fusion_autotune_top_k_configs=4",
    "graphs": f"{_ALL} --xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,WHILE "
    "--xla_gpu_graph_min_graph_size=1",
    "concurrent": f"{_ALL} --xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,WHILE "
    "--xla_gpu_command_buffer_scheduling_mode=CONCURRENT --xla_gpu_graph_min_graph_size=1",
    "no_graphs": f"{_ALL} --xla_gpu_enable_command_buffer=",
}
TOKEN_PIXELS = 16
LORA_RANK = 32
STEPS_A_CALL = 5


def random_network(
    config: FluxConfig, dtype: jnp.dtype, *, scan_blocks: bool = False, split: bool = False
) -> tuple[FluxGraph, nnx.State]:
    """A transformer with a corrector LoRA; every leaf drawn on the device.

    Args:
        split: see :func:`rflow_jax.models.flux.split.split_kernels`.
    """
    network = abstract_flux(config, dtype)
    attach_shapes(network, dict.fromkeys(select(linears(network), CORRECTOR_TARGET_MODULES), LORA_RANK), dtype=dtype)
    graph = FluxGraph.of(network, scan_blocks=scan_blocks)
    state = jax.eval_shape(graph.stacked, nnx.state(network))

    @partial(jax.jit, static_argnums=(1, 2))
    def draw(key, shape, dtype):
        return jax.random.normal(key, shape, dtype) * (shape[-2:][0] ** -0.5 if shape else 1)

    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = tree.unflatten([draw(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)])
    return graph, split_kernels(drawn, config) if split else drawn


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
    compiled = steps.lower(state, x, t5, pooled, condition).compile()
    first = time.perf_counter() - begin
    x = compiled(state, x, t5, pooled, condition).block_until_ready()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        x = compiled(state, x, t5, pooled, condition).block_until_ready()
        times.append((time.perf_counter() - begin) / STEPS_A_CALL)
    if profile:
        print(epilogues(compiled))
        print_kernels(lambda: compiled(state, jnp.array(x), t5, pooled, condition).block_until_ready(), STEPS_A_CALL)
    if not np.isfinite(np.asarray(x)).all():
        raise SystemExit("not finite: the figures would mean nothing")
    seconds = statistics.median(times)
    flops = batch * forward_flops(config, text=text, image=image, condition=c)
    return {
        "ms": seconds * 1e3,
        "spread": (max(times) - min(times)) * 1e3,
        "tflops": flops / seconds / 1e12,
        "first_s": first,
        "gib": _peak_gib(),
    }


def _peak_gib() -> float:
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", 0) / 2**30


def print_rows(arguments: argparse.Namespace, flags: str) -> None:
    """Measures every combination in this process."""
    config, *sizes = SIZES[arguments.size]
    for kernels in arguments.kernels:
        options = {"scan_blocks": arguments.scan_blocks, "split": kernels == "split" and not arguments.scan_blocks}
        graph, state = random_network(config, jnp.bfloat16, **options)
        name = f"{flags}, {'stacked' if arguments.scan_blocks else kernels}"
        for batch in arguments.batch:
            for with_condition in {"yes": (True,), "no": (False,), "both": (False, True)}[arguments.condition]:
                row = measure(graph, state, config, sizes, batch, with_condition, arguments.repeats, arguments.profile)
                print(
                    f"{name:26s} {batch:5d} {'yes' if with_condition else 'no':9s} {row['ms']:8.2f} "
                    f"{row['ms'] / batch:14.2f} {row['spread']:7.2f} {row['tflops']:8.0f} {row['first_s']:10.1f} "
                    f"{row['gib']:9.1f}",
                    flush=True,
                )
        del graph, state


def print_in_processes(arguments: argparse.Namespace) -> None:
    """Runs this program once for each set of flags, then the peer; one that fails is said and left out."""
    own = [argument for argument in sys.argv[1:] if argument != "--peer"]
    runs: list[tuple[str, list[str], str]] = [
        (name, ["-m", "benchmarks.step", *own, "--only", name], FLAGS[name]) for name in arguments.flags
    ]
    if arguments.peer:
        sizes = ["--size", arguments.size, "--batch", *map(str, arguments.batch), "--repeats", str(arguments.repeats)]
        runs.append(("diffusers", ["-m", "benchmarks.step_torch", *sizes], ""))
    print(f"{'variant':26s} batch condition  ms/step  ms/image-step  spread  TFLOP/s  compile s  peak GiB", flush=True)
    for name, command, flags in runs:
        environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
        if name == "diffusers":
            environment["JAX_PLATFORMS"] = "cpu"
        try:
            done = subprocess.run([sys.executable, *command], env=environment, timeout=arguments.limit, check=False)
            if done.returncode:
                print(f"{name}: failed with exit status {done.returncode}", flush=True)
        except subprocess.TimeoutExpired:
            print(f"{name}: took longer than {arguments.limit} s", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="dev")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--condition", choices=("yes", "no", "both"), default="both")
    parser.add_argument("--kernels", choices=("split", "whole"), nargs="+", default=["split"])
    parser.add_argument("--flags", choices=FLAGS, nargs="+", default=["default"])
    parser.add_argument("--scan_blocks", action="store_true", help="with stacked blocks")
    parser.add_argument("--peer", action="store_true", help="also diffusers, if it is installed")
    parser.add_argument("--limit", type=float, default=300, help="seconds that each process may take")
    parser.add_argument("--profile", action="store_true", help="also print kernels by kind and the longest ones")
    parser.add_argument("--only", choices=FLAGS, help=argparse.SUPPRESS)  # the set of flags this process runs under
    arguments = parser.parse_args()
    if arguments.only is None:
        print_in_processes(arguments)
    else:
        print_rows(arguments, arguments.only)


if __name__ == "__main__":
    main()
