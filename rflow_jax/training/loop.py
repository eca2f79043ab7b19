"""The training loop: its preparation, its steps, and when it saves and validates."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import jax

from rflow_jax.data.loader import Loader
from rflow_jax.data.sources.stream import merge_positions
from rflow_jax.errors import RunError
from rflow_jax.parallel.distributed import Preemption, allgather_strings, raise_on_all, start_processes
from rflow_jax.parallel.mesh import make_mesh, samples_along
from rflow_jax.parallel.runtime import reproducible, use_compilation_cache
from rflow_jax.training.checkpoints import Checkpoints
from rflow_jax.training.config import CommonConfig
from rflow_jax.training.metrics import MetricWriter
from rflow_jax.training.optimizers import make_optimizer
from rflow_jax.training.partition import count_params
from rflow_jax.training.prefetch import prefetch_to_device
from rflow_jax.training.run_folder import open_folder, write_config
from rflow_jax.training.task import Task, TrainStep, Validation, load_task
from rflow_jax.training.train_state import TrainState, init_state


class Run(NamedTuple):
    """The parts of a run, once everything is loaded."""

    config: CommonConfig
    task: Task
    first: TrainState
    take_step: TrainStep
    checkpoints: Checkpoints
    loader: Loader
    validation: Validation | None
    watch: MetricWriter


def train(config: CommonConfig) -> None:
    """Trains until the last step or SIGTERM; either way everything is saved before it returns."""
    start_processes(config.distributed)
    use_compilation_cache()
    with ExitStack() as stack, reproducible(config.train.dtype):
        run = prepare(config, stack)
        with Preemption() as preemption:
            loop(run, preemption)


def prepare(config: CommonConfig, stack: ExitStack) -> Run:
    """Checks and loads everything, cheap checks first; what must be closed later goes onto the stack."""
    out, mesh = Path(config.out), make_mesh(config.mesh)
    config.train.check_batch(samples_along(mesh))
    with raise_on_all():
        stack.enter_context(open_folder(out, config.resume))
    with raise_on_all():
        task = load_task(config, mesh)
    optimizer = make_optimizer(config.optimizer)
    state, shardings = init_state(task.trainable, optimizer, mesh)

    checkpoints = stack.enter_context(closing(Checkpoints(out, config.checkpoint)))
    restored = checkpoints.restore(task.to_saved(state), config.flat()) if config.resume else None
    state, position = (task.to_running(restored[0]), restored[1]) if restored else (state, None)
    start = int(state.step)

    with raise_on_all():
        loader = stack.enter_context(task.open_loader(start, position))
    validation = task.open_validation(out)

    write_config(out, config.public())
    numbers = {"steps": config.train.steps, "batch_size": config.train.batch_size, "flops": task.flops}
    writer = MetricWriter(out, config.logging, **numbers, resumed=start, dtype=config.train.dtype)
    watch = stack.enter_context(closing(writer))
    watch.info(headline(config, mesh, task, start))
    return Run(config, task, state, task.make_step(optimizer, shardings), checkpoints, loader, validation, watch)


def loop(run: Run, preemption: Preemption) -> None:
    """Runs the steps. The metrics of a step are read while the next one is computed."""
    config, state = run.config, run.first
    first = step = int(state.step)
    last = stop = False
    if step:
        run.checkpoints.export_missing(run.task.to_saved(state), run.task.exporter)
    if validation_is_due(run, step) and not run.watch.was_validated(step):
        validate(run, state, step)  # before the first step, or because the previous run ended too early for it
    with closing(prefetch_to_device(iter(run.loader), run.task.put)) as batches:
        unwritten: tuple[int, Any, Any] | None = None
        while step < config.train.steps and not stop:
            batch, inputs = next(batches)
            with jax.transfer_guard("disallow"):
                state, report = run.take_step(state, inputs)
            write_metrics(run, unwritten)
            step, unwritten = step + 1, (step + 1, report, batch)
            if step == first + 1:  # it was compiled
                write_metrics(run, unwritten)
                unwritten = None
                run.watch.restart_clock()
            last = step == config.train.steps
            stop = preemption.asked(step)
            if stop or last or step % config.checkpoint.every == 0:
                write_metrics(run, unwritten)  # first, so that a step with a non-finite loss is not saved
                unwritten = None
                position = gather_data_state(run.loader.position(step))
                with run.watch.paused():
                    run.checkpoints.save(run.task.to_saved(state), position, config.flat(), run.task.exporter)
            if validation_is_due(run, step) and not stop:
                write_metrics(run, unwritten)
                unwritten = None
                validate(run, state, step)
    run.checkpoints.wait()
    done = "stopped by SIGTERM; resume with --resume" if stop and not last else "done"
    run.watch.info(f"step {step} is saved in {config.out}: {done}")


def write_metrics(run: Run, unwritten: tuple[int, Any, Any] | None) -> None:
    """Writes the metrics of one step.

    Raises:
        RunError: the loss or the gradient is not finite.
    """
    if unwritten is None:
        return
    step, report, batch = unwritten
    report = jax.device_get(report)
    if not (math.isfinite(report.loss) and math.isfinite(report.gradient_norm)):
        kept = run.checkpoints.steps
        raise RunError(
            f"step {step}: the loss is {report.loss}, the gradient's norm {report.gradient_norm}; "
            + (f"the checkpoint of step {kept[-1]} is good" if kept else "there is no checkpoint yet")
            + "; lower optimizer.lr or optimizer.max_grad_norm, or set train.dtype to float32"
        )
    metrics = {name: float(one.total / one.of) for name, one in report.metrics.items() if one.of}
    run.watch.step(step, report, batch, run.loader.drawn(step), metrics)


def validation_is_due(run: Run, step: int) -> bool:
    """Whether the parameters of this step are to be validated."""
    return run.validation is not None and (step % run.validation.every == 0 or step == run.config.train.steps)


def validate(run: Run, state: TrainState, step: int) -> None:
    """Evaluates the parameters on held-out records."""
    if run.validation is not None:
        run.watch.validated(step, run.validation.run(step, state.trainable))


def headline(config: CommonConfig, mesh: jax.sharding.Mesh, task: Task, start: int) -> str:
    """The task, model, devices and steps of a run in one line."""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    kind, devices = jax.devices()[0].device_kind, jax.device_count()
    return (
        f"{task.title} of {count_params(task.trainable):,} parameters on {config.model}; {devices} x {kind} ({axes}); "
        f"batch {config.train.batch_size}; step {start} of {config.train.steps}; {config.out}"
    )


def gather_data_state(position: dict[str, Any]) -> dict[str, Any]:
    """The position of all processes' data; all must call it, and all get the same.

    Only streams have a position per process.
    """
    if jax.process_count() == 1 or "streams" not in position:
        return position
    return merge_positions([json.loads(text) for text in allgather_strings(json.dumps(position))])
