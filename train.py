"""Trains the corrector on GenRef: ``python train.py --help``."""

from __future__ import annotations

import math
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rflow_jax import cli
from rflow_jax.data.loader import Loader, open_loader
from rflow_jax.errors import RunError
from rflow_jax.models.flux.cost import forward_flops
from rflow_jax.parallel.mesh import make_mesh, samples_along, start_processes
from rflow_jax.parallel.runtime import reproducible, use_compilation_cache
from rflow_jax.training.checkpoints import Checkpoints
from rflow_jax.training.config import RunConfig
from rflow_jax.training.feed import feed, put_pixels, slots_here
from rflow_jax.training.folder import open_folder, write_config
from rflow_jax.training.model import Trained, count, load_trained
from rflow_jax.training.optimizers import make_optimizer
from rflow_jax.training.preemption import Preemption
from rflow_jax.training.step import Recipe, Shape, State, init_state, make_encode, make_step
from rflow_jax.training.validation import Validation
from rflow_jax.training.watch import Watch


class Run(NamedTuple):
    """What a run consists of, once everything is there."""

    config: RunConfig
    mesh: jax.sharding.Mesh
    trained: Trained
    recipe: Recipe
    first: State
    take_step: Any
    encode: Any
    checkpoints: Checkpoints
    loader: Loader
    validation: Validation | None
    watch: Watch


def train(config: RunConfig) -> None:
    """Trains until the last step, or until SIGTERM; either way everything is saved before it returns."""
    start_processes(config.distributed)
    use_compilation_cache()
    with ExitStack() as stack, reproducible(config.train.dtype):
        run = prepare(config, stack)
        with Preemption() as preemption:
            loop(run, preemption)


def prepare(config: RunConfig, stack: ExitStack) -> Run:
    """Checks and loads everything, what is cheap to check first; what must be closed again goes onto the stack."""
    out, mesh = Path(config.out), make_mesh(config.mesh)
    config.train.check_batch(samples_along(mesh))
    open_folder(out, config.resume)

    trained = load_trained(config.model, config.trainable, seed=config.train.seed, dtype=config.train.dtype, mesh=mesh)
    recipe = make_recipe(config, trained)
    optimizer = make_optimizer(config.optimizer)
    state, shardings = init_state(trained.trainable, optimizer, mesh)

    checkpoints = stack.enter_context(closing(Checkpoints(out, config.checkpoint)))
    restored = checkpoints.restore(state, config.flat()) if config.resume else None
    state, position = restored or (state, None)
    start = int(state.step)

    slots = slots_here(mesh, config.train.batch_size)
    how = {"seed": config.train.seed, "batch_size": config.train.batch_size, "slots": slots}
    loader = stack.enter_context(open_loader(config.data, **how, start=start, position=position))
    validation = None
    if config.validation.shards is not None:
        validation = Validation(config.validation, config.data, trained, recipe, mesh, out)

    write_config(out, asdict(config))
    numbers = {"steps": config.train.steps, "batch_size": config.train.batch_size}
    flops = flops_of_sample(trained, recipe)
    watch = stack.enter_context(closing(Watch(out, config.watch, **numbers, flops=flops, resumed=start)))
    watch.say(headline(config, mesh, trained, start))
    step = make_step(trained.graph, trained.bundle.flux_config, optimizer, recipe, mesh, shardings)
    encode = make_encode(trained.bundle, recipe, mesh)
    return Run(config, mesh, trained, recipe, state, step, encode, checkpoints, loader, validation, watch)


def loop(run: Run, preemption: Preemption) -> None:
    """The steps. What a step tells is read while the next one is computed."""
    config, state, frozen = run.config, run.first, run.trained.frozen
    first = step = int(state.step)
    encoders = {name: run.trained.bundle.weights[name] for name in ("vae", "clip", "t5")}
    if step == 0:
        validate(run, state, step)
    put = put_pixels(run.trained.bundle, run.recipe.shape.text, run.mesh)
    with closing(feed(iter(run.loader), put)) as batches:
        untold: tuple[int, Any, Any] | None = None
        stop = False
        while step < config.train.steps and not stop:
            batch, inputs = next(batches)
            with jax.transfer_guard("disallow"):
                examples = run.encode(encoders, inputs)
                state, report = run.take_step(state, frozen, examples, inputs.numbers)
            tell(run, untold)
            step, untold = step + 1, (step + 1, report, batch)
            if step == first + 1:  # it was compiled
                tell(run, untold)
                untold = None
                run.watch.restart_clock()
            last = step == config.train.steps
            stop = preemption.asked(step)
            if stop or last or step % config.checkpoint.every == 0:
                tell(run, untold)  # first, so that a step that went wrong is not saved
                untold = None
                run.checkpoints.save(state, run.loader.position(step), config.flat(), run.trained)
            if not stop and (last or step % config.validation.every == 0):
                tell(run, untold)
                untold = None
                validate(run, state, step)
    run.checkpoints.wait()
    done = "stopped by SIGTERM; go on with --resume" if stop and not last else "done"
    run.watch.say(f"step {step} is saved in {config.out}: {done}")


def tell(run: Run, untold: tuple[int, Any, Any] | None) -> None:
    """Hands the numbers of one step to the watch.

    Raises:
        RunError: the loss is not finite.
    """
    if untold is None:
        return
    step, report, batch = untold
    report = jax.device_get(report)
    if not math.isfinite(report.loss):
        kept = run.checkpoints.steps
        raise RunError(
            f"step {step}: the loss is {report.loss}; "
            + (f"the checkpoint of step {kept[-1]} is good" if kept else "there is no checkpoint yet")
            + "; lower optimizer.lr or optimizer.clip, or set train.dtype to float32"
        )
    run.watch.step(step, report, batch, run.loader.drawn(step))


def validate(run: Run, state: State, step: int) -> None:
    """Tries the parameters on held-out records."""
    if run.validation is None:
        return
    losses = run.validation.run(step, state.trainable)
    run.watch.validated(step, losses)


def make_recipe(config: RunConfig, trained: Trained) -> Recipe:
    """How a step is computed, the sizes in the model's own tokens.

    Raises:
        InputError: the pictures' sizes do not fit the model.
    """
    bundle, how, data = trained.bundle, config.train, config.data
    data.require_grid(bundle.token_pixels)
    shape = Shape(
        how.max_sequence_length or bundle.default_t5_length,
        (data.target_size // bundle.token_pixels,) * 2,
        (data.condition_size // bundle.token_pixels,) * 2,
    )
    dtype = jnp.dtype(how.dtype)
    return Recipe(how.seed, dtype, shape, how.flags, how.remat, how.accumulation, how.attention)


def flops_of_sample(trained: Trained, recipe: Recipe) -> float:
    """Floating-point operations of a sample, forward and backward, without what is computed again to save memory."""
    text, (rows, columns), (c_rows, c_columns) = recipe.shape.text, recipe.shape.image, recipe.shape.condition
    forward = forward_flops(trained.bundle.flux_config, text=text, image=rows * columns, condition=c_rows * c_columns)
    # Of frozen weights no gradient is computed, only that of what passes through them.
    return forward * (2 if trained.is_lora else 3)


def headline(config: RunConfig, mesh: jax.sharding.Mesh, trained: Trained, start: int) -> str:
    """What is trained on what, in one line."""
    what = "a LoRA" if trained.is_lora else "parameters"
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    kind, devices = jax.devices()[0].device_kind, jax.device_count()
    return (
        f"{what} of {count(trained.trainable):,} numbers on {config.model}; {devices} x {kind} ({axes}); batch "
        f"{config.train.batch_size}; step {start} of {config.train.steps}; {config.out}"
    )


COMMAND = cli.Command("Train the corrector on GenRef.", (RunConfig,), train)

if __name__ == "__main__":
    raise SystemExit(cli.run(lambda: cli.run_command(COMMAND)))
