"""Milliseconds and memory of one training step on this machine's accelerators, with random weights and encoded samples.

    python -m benchmarks.train_step [--size dev|part|tiny] [--batch 1 2 4] [--remat dots_and_attention full] [--fsdp 2]
        [--scan_blocks]

A rank-32 LoRA in float32 on a bfloat16 base, Prodigy, a condition; encoding pictures and texts is not included. All
rows are compiled side by side and timed one after the other, and printed as a table: devices, remat, batch,
milliseconds a step and a sample, model TFLOP/s (two forward passes' worth) a device, GiB that the program needs on a
device as the compiler counts it, seconds to trace and to compile, the losses of the first steps. ``--fsdp N`` adds a
row for the largest batch that N divides, with the weights cut over N devices: its losses are those of the same row on
one device.
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.kernels import print_kernels
from benchmarks.step import SIZES, STEPS_A_CALL, grid, random_network
from rflow_jax.models.flux.config import FluxConfig, forward_flops
from rflow_jax.models.flux.transformer import FluxGraph
from rflow_jax.models.options import Remat
from rflow_jax.parallel.mesh import MeshConfig, make_mesh, put_batch
from rflow_jax.parallel.sharding import sharding_for
from rflow_jax.training.config import OptimizerConfig
from rflow_jax.training.corrector.loss import Examples
from rflow_jax.training.corrector.step import StepSpec, TokenShape, make_step
from rflow_jax.training.optimizers import make_optimizer
from rflow_jax.training.train_state import init_state

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
LOSSES_SHOWN = 3
DISTANCE = 1e-3  # Prodigy's first guess: large enough for the losses of a few steps to differ
HEADER = "devices remat              batch   ms/step  ms/sample  TFLOP/s  GiB  trace s  compile s  losses"


@dataclass(frozen=True)
class Case:
    """What a row measures."""

    remat: Any
    batch: int
    fsdp: int = 1


@dataclass
class Job:
    """A row on its way: the compiled step and what it is called with."""

    case: Case
    state: Any
    frozen: Any
    inputs: tuple[Examples, jax.Array]
    trace_s: float
    compiled: Future[tuple[Any, float]]


@dataclass(frozen=True)
class Model:
    """A random network in two parts, and the sizes of its samples."""

    config: FluxConfig
    shape: TokenShape
    graph: FluxGraph
    trainable: Any
    frozen: Any


def make_model(size: str, *, scan_blocks: bool = False, split: bool = False) -> Model:
    """The network of one of ``SIZES``, drawn on the first device; ``split`` as of :func:`random_network`."""
    config, side, condition_side, text = SIZES[size]
    graph, state = random_network(config, jnp.bfloat16, scan_blocks=scan_blocks, split=split)
    _, trainable, frozen = nnx.split(graph.merge(state), nnx.LoRAParam, ...)
    trainable = jax.tree.map(lambda x: x.astype(jnp.float32) * 0.01, trainable)
    shape = TokenShape(text, grid(side), grid(condition_side))
    return Model(config, shape, graph, trainable, frozen)


def encoded(config: FluxConfig, batch: int, shape: TokenShape) -> Examples:
    """Random samples as the encoders would give them."""
    keys = jax.random.split(jax.random.key(1), 4)
    image, condition = (rows * columns for rows, columns in (shape.image, shape.condition))
    return Examples(
        jax.random.normal(keys[0], (batch, image, config.in_channels)),
        jax.random.normal(keys[1], (batch, condition, config.in_channels), jnp.bfloat16),
        jax.random.normal(keys[2], (batch, shape.text, config.joint_attention_dim), jnp.bfloat16),
        jax.random.normal(keys[3], (batch, config.pooled_projection_dim), jnp.bfloat16),
    )


def begin(model: Model, case: Case, pool: ThreadPoolExecutor) -> Job:
    """Places a row's arrays and traces its step; the compiler goes on in the pool."""
    mesh = make_mesh(MeshConfig(fsdp=case.fsdp), jax.devices()[: case.fsdp])
    choose = sharding_for(mesh)

    def place(state: Any) -> Any:
        if mesh.size == 1:
            return jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
        flat = nnx.to_flat_state(state)
        where = [(path, v.replace(choose(".".join(map(str, path)), v.shape))) for path, v in flat]
        return jax.device_put(state, nnx.from_flat_state(where))

    optimizer = make_optimizer(OptimizerConfig(d0=DISTANCE))
    recipe = StepSpec(0, jnp.bfloat16, model.shape, remat=case.remat)
    state, shardings = init_state(place(jax.tree.map(jnp.copy, model.trainable)), optimizer, mesh)
    frozen = place(model.frozen)
    step = make_step(model.graph, optimizer, recipe, mesh, shardings)
    examples = put_batch(mesh, jax.device_get(encoded(model.config, case.batch, model.shape)))
    inputs = examples, put_batch(mesh, np.arange(case.batch, dtype=np.uint32))
    start = time.perf_counter()
    lowered = step.lower(state, frozen, *inputs)
    return Job(case, state, frozen, inputs, time.perf_counter() - start, pool.submit(compile_timed, lowered))


def compile_timed(lowered: Any) -> tuple[Any, float]:
    """The compiled step, and how long that took beside the others."""
    start = time.perf_counter()
    return lowered.compile(), time.perf_counter() - start


def finish(model: Model, job: Job, repeats: int, profile: bool) -> str:
    """Times a compiled row and puts it into words."""
    step, compile_s = job.compiled.result()
    state, told = step(job.state, job.frozen, *job.inputs)
    job.state = None  # it was donated
    losses, moments = [float(told.loss)], []
    state, told = step(state, job.frozen, *job.inputs)
    for _ in range(repeats):  # as in training, a step's loss is read once the next step is under way
        state, report = step(state, job.frozen, *job.inputs)
        losses.append(float(told.loss))
        moments.append(time.perf_counter())
        told = report
    if profile:

        def few() -> None:
            nonlocal state, told
            for _ in range(STEPS_A_CALL):
                state, told = step(state, job.frozen, *job.inputs)
            told.loss.block_until_ready()

        print_kernels(few, STEPS_A_CALL)
    if not np.isfinite(losses).all():
        raise SystemExit("not finite: the figures would mean nothing")
    case, shape = job.case, model.shape
    seconds = statistics.median(np.diff(moments))
    tokens = {"text": shape.text, "image": shape.image[0] ** 2, "condition": shape.condition[0] ** 2}
    flops = 2 * case.batch * forward_flops(model.config, **tokens) / case.fsdp
    return (
        f"{case.fsdp:7d} {case.remat:18s} {case.batch:5d} {seconds * 1e3:9.1f} {seconds * 1e3 / case.batch:10.1f} "
        f"{flops / seconds / 1e12:8.0f} {_gib(step):4.1f} {job.trace_s:8.1f} {compile_s:10.1f}  "
        + " ".join(f"{loss:.6f}" for loss in losses[:LOSSES_SHOWN])
    )


def _gib(step: Any) -> float:
    memory = step.memory_analysis()
    sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return (sizes - memory.alias_size_in_bytes) / 2**30


def main() -> None:
    """Measures every combination; one that does not fit is said and left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="dev")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--remat", nargs="+", default=["full", "dots_and_attention"], choices=get_args(Remat))
    parser.add_argument("--fsdp", type=int, default=1, help="also on this many devices")
    parser.add_argument("--scan_blocks", action="store_true", help="with stacked blocks")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="also print the longest kernels")
    arguments = parser.parse_args()
    cases = [Case(remat, batch) for remat in arguments.remat for batch in arguments.batch]
    if arguments.fsdp > 1:
        batch = max(batch for batch in arguments.batch if batch % arguments.fsdp == 0)
        cases.insert(0, Case(arguments.remat[0], batch, arguments.fsdp))
    print(f"{arguments.fsdp} x {jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    alone = arguments.fsdp == 1 and not arguments.scan_blocks
    model = make_model(arguments.size, scan_blocks=arguments.scan_blocks, split=alone)
    with ThreadPoolExecutor(len(cases)) as pool:
        jobs = [begin(model, case, pool) for case in cases]
        print(HEADER, flush=True)
        by_program = {job.compiled: job for job in jobs}
        del jobs
        for compiled in as_completed(list(by_program)):
            job = by_program.pop(compiled)
            try:
                row = finish(model, job, arguments.repeats, arguments.profile)
            except jax.errors.JaxRuntimeError as error:
                if OUT_OF_MEMORY not in str(error):
                    raise
                row = f"{job.case.fsdp:7d} {job.case.remat:18s} {job.case.batch:5d} does not fit"
            print(row, flush=True)


if __name__ == "__main__":
    main()
