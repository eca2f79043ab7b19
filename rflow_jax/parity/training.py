"""Recordings 08: loss, gradients, and what a few steps of each optimizer do to the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from rflow_jax.flow import image_ids, text_ids
from rflow_jax.models.flux.layers import Rope, rope_table
from rflow_jax.parity.encoders import embed, image_tokens
from rflow_jax.parity.measure import INPUT, PARAMETERS, Moved, Recording
from rflow_jax.training.config import OptimizerConfig
from rflow_jax.training.corrector.loss import TRAINING_GUIDANCE, Examples, flow_matching_loss, noisy, predict
from rflow_jax.training.optimizers import ProdigyNumbers, make_optimizer, prodigy_numbers
from rflow_jax.typing import Array
from rflow_jax.weights.mappings.flux import DIFFUSERS
from rflow_jax.weights.safetensors_io import TensorFiles

STEP, GRADIENTS, OPTIMIZERS = "08_train", "08_grads", "08_optim"
Result = tuple[str, Any]
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Problem:
    """The recorded batch, with the loss as a function of the LoRA's state."""

    examples: Examples
    rope: Rope
    t: Array
    x_1: Array
    lora: Any
    network: Callable[[Any], Any]

    def loss(self, lora: Any) -> Array:
        return flow_matching_loss(self.network(lora), self.examples, self.t, self.x_1, self.rope)

    @cached_property
    def loss_and_gradient(self) -> Callable[[Any], tuple[Array, Any]]:
        """The compiled loss of a LoRA's state, with its gradient."""
        return jax.jit(jax.value_and_grad(self.loss))


@lru_cache(maxsize=1)  # three checks share it, and its compiled loss
def make_problem(recording: Recording) -> Problem:
    """Encodes the recorded images and texts with the recorded draws."""
    z, meta = recording.arrays(STEP), recording.json("train_meta")
    flux = recording.pipeline.bundle
    vae = nnx.merge(flux.graphs.vae, flux.weights["vae"])
    clip_ids = flux.tokenizers.clip(meta["original_prompt (CLIP)"], flux.clip_length)
    (prompts,) = (texts for key, texts in meta.items() if key.startswith("description"))
    t5_ids = flux.tokenizers.t5(prompts, z["prompt_embeds"].shape[1])
    _, pooled = embed(nnx.merge(flux.graphs.clip, flux.weights["clip"]), jnp.asarray(clip_ids))
    text = embed(nnx.merge(flux.graphs.t5, flux.weights["t5"]), jnp.asarray(t5_ids))
    x_0 = image_tokens(vae, z["in_image_uint8"], z["in_vae_noise_image"])
    condition = image_tokens(vae, z["in_condition_uint8"], z["in_vae_noise_condition"])
    corrector = recording.corrector
    graph, lora, rest = nnx.split(corrector, nnx.LoRAParam, ...)
    ids = np.concatenate([text_ids(text.shape[1]), _ids(z["in_image_uint8"], flux), condition_ids(recording)])
    config = flux.flux_config
    return Problem(
        Examples(x_0, condition, text, pooled),
        rope_table(ids, config.axes_dims_rope, config.rope_theta),
        jax.nn.sigmoid(jnp.asarray(z["in_t_logit"])),
        jnp.asarray(z["in_x1"]),
        lora,
        lambda lora: nnx.merge(graph, lora, rest),
    )


def condition_ids(recording: Recording) -> np.ndarray:
    """Positions of the condition's tokens, moved by the recorded delta."""
    z = recording.arrays(STEP)
    row, column = (int(x) for x in z["in_position_delta"])
    return _ids(z["in_condition_uint8"], recording.pipeline.bundle, (row, column))


def _ids(images: np.ndarray, flux: Any, delta: tuple[int, int] = (0, 0)) -> np.ndarray:
    rows, columns = (side // flux.token_pixels for side in images.shape[1:3])
    return image_ids(rows, columns, delta)


def step(recording: Recording) -> Iterator[Result]:
    """08_train: everything on the way to the loss, and the gradients' norms."""
    problem = make_problem(recording)
    examples, t = problem.examples, problem.t
    x_t = noisy(examples.x_0, problem.x_1, t)
    yield "x_0", examples.x_0
    yield "x_t", x_t
    yield "condition_latents", examples.condition
    yield "condition_ids", condition_ids(recording)
    yield "prompt_embeds", examples.text
    yield "pooled", examples.pooled
    yield "guidance", np.full(t.shape, TRAINING_GUIDANCE, np.float32)
    yield "pred", jax.jit(lambda lora: predict(problem.network(lora), examples, x_t, t, problem.rope))(problem.lora)
    loss, gradients = problem.loss_and_gradient(problem.lora)
    yield "loss", loss
    named = _named(gradients)
    norms = {name: np.linalg.norm(gradient.astype(np.float64).ravel()) for name, gradient in named.items()}
    yield "grad_norms", np.asarray([norms[name] for name in recording.json("lora_keys")])
    yield "grad_norm_total", np.linalg.norm(list(norms.values()))


def gradients(recording: Recording) -> Iterator[Result]:
    """08_grads: the gradient of every LoRA tensor."""
    problem = make_problem(recording)
    yield from _named(problem.loss_and_gradient(problem.lora)[1]).items()


@dataclass(frozen=True)
class RecordedRun:
    """One recorded optimization."""

    prefix: str  # of its arrays' names
    config: OptimizerConfig
    steps: int
    parameters: dict[int, str]  # steps taken -> file with the parameters then


def runs(recording: Recording) -> list[RecordedRun]:
    """The recorded runs, with the settings of the metadata."""
    meta = recording.meta
    prodigy, big, clip2 = meta["prodigy"], meta["prodigy_bigd"], meta["prodigy_clip2"]
    if prodigy["growth_rate"] != "inf" or not prodigy["use_bias_correction"] or prodigy["beta3"] is not None:
        raise ValueError("recordings of Prodigy with a growth rate, a beta3 or without bias correction")
    common = {"max_grad_norm": meta["gradient_clip"]}
    base = OptimizerConfig("prodigy", **_settings(prodigy), **common)
    small = float(recording.arrays(OPTIMIZERS)["clip2"])
    adamw = OptimizerConfig("adamw", **_settings(meta["adamw"]), **common)
    adamw_file = f"{PARAMETERS}adamw{meta['adamw']['steps']}"
    files = {steps: f"{PARAMETERS}prodigy{steps}" for steps in prodigy["steps"]}
    replaced = {**_settings(prodigy), "d0": big["d0"]}
    return [
        RecordedRun("adamw", adamw, meta["adamw"]["steps"], {meta["adamw"]["steps"]: adamw_file}),
        RecordedRun("prodigy", base, max(prodigy["steps"]), files),
        RecordedRun(
            "prodigy_clip2", OptimizerConfig("prodigy", **_settings(prodigy), max_grad_norm=small), clip2["steps"], {}
        ),
        RecordedRun(
            "prodigy_bigd",
            OptimizerConfig("prodigy", **replaced, **common),
            big["steps"],
            {big["steps"]: f"{PARAMETERS}prodigy_bigd{big['steps']}"},
        ),
    ]


def _settings(meta: dict[str, Any]) -> dict[str, Any]:
    known = {key: meta[key] for key in OptimizerConfig.__dataclass_fields__ if key in meta}
    return known | {"betas": tuple(known["betas"])}


def optimizers(recording: Recording) -> Iterator[Result]:
    """08_optim and 08_params_*: by ``file/array``, since a run has arrays in several files."""
    problem = make_problem(recording)
    start = {key: tensor for key, tensor in TensorFiles.open(recording.lora_path).stream() if ".lora_" in key}
    yield f"{OPTIMIZERS}/clip2", INPUT
    for run in runs(recording):
        yield from _follow(problem, run, start)


def _follow(problem: Problem, run: RecordedRun, start: Tensors) -> Iterator[Result]:
    optimizer = make_optimizer(run.config)

    @jax.jit
    def advance(lora: Any, state: Any, gradient: Any) -> tuple[Any, Any, Array, ProdigyNumbers | None]:
        updates, state = optimizer.update(gradient, state, lora)
        found = prodigy_numbers(state, run.config.d_coef)
        return optax.apply_updates(lora, updates), state, optax.tree.norm(gradient), found

    lora, state = problem.lora, jax.jit(optimizer.init)(problem.lora)
    losses, norms, numbers = [], [], []
    for taken in range(1, run.steps + 1):
        loss, gradient = problem.loss_and_gradient(lora)
        lora, state, norm, found = advance(lora, state, gradient)
        losses.append(np.asarray(loss))
        norms.append(np.asarray(norm))
        if found is not None:
            numbers.append(np.stack(jax.device_get(found)))
        if taken in run.parameters:
            for name, value in _named(lora).items():
                yield f"{run.parameters[taken]}/{name}", Moved(value, start[name])
    yield f"{OPTIMIZERS}/{run.prefix}_losses", np.stack(losses)
    yield f"{OPTIMIZERS}/{run.prefix}_grad_norms", np.stack(norms)
    if numbers:
        yield f"{OPTIMIZERS}/{run.prefix}_d", np.stack(numbers)


def _named(lora: Any) -> Tensors:
    """The LoRA's state (or its gradient) under diffusers' names and in their layout."""
    tensors: Tensors = {}
    for path, variable in nnx.to_flat_state(lora):
        *module, leaf = map(str, path)
        name = DIFFUSERS.module(".".join(module))[1]
        value = np.asarray(variable.get_value())
        tensors[f"transformer.{name}.{'lora_A' if leaf == 'lora_a' else 'lora_B'}.weight"] = value.T
    return tensors
