"""The programs of the corrector's training, of a real configuration: the encoders and the step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from rflow_jax.aot.estimate import autoencoder_flops, encoder_flops, flux_bytes, t5_flops
from rflow_jax.aot.models import abstract_bundle, corrector_ranks, fitting, read_sizes, whole_of
from rflow_jax.aot.placed import abstract_state, on_mesh
from rflow_jax.aot.program import AheadProgram, bytes_on_a_device, shaped
from rflow_jax.models.flux.cost import training_flops
from rflow_jax.models.flux.graph import FluxGraph
from rflow_jax.models.flux.transformer import abstract_flux
from rflow_jax.models.lora import attach_shapes, linears, select
from rflow_jax.parallel.mesh import BATCH, samples_along
from rflow_jax.parallel.runtime import reproducible
from rflow_jax.training.config import RunConfig
from rflow_jax.training.corrector import make_recipe
from rflow_jax.training.feed import AHEAD
from rflow_jax.training.latents import LatentInputs, make_encode_latents
from rflow_jax.training.model import Trained, split_moving
from rflow_jax.training.optimizers import make_optimizer
from rflow_jax.training.step import ENCODERS, Inputs, Recipe, make_encode, make_step
from rflow_jax.weights import components
from rflow_jax.weights.bundle import Bundle, scans_blocks


def training_programs(config: RunConfig, mesh: Mesh, *, blocks: tuple[int, int] | None = None) -> list[AheadProgram]:
    """What ``train.py`` compiles for this configuration on this mesh.

    Args:
        blocks: so many double and single blocks, for a quick check.

    Raises:
        InputError: the model or a setting is not usable.
    """
    config.train.check_batch(samples_along(mesh))
    trained = abstract_trained(config, mesh, blocks)
    recipe, optimizer = make_recipe(config, trained), make_optimizer(config.optimizer)
    state, shardings = abstract_state(trained.trainable, optimizer, mesh)
    precomputed = config.data.format == "precomputed"
    bundle, size = trained.bundle, config.train.batch_size
    inputs = (_latents if precomputed else _pictures)(config, bundle, recipe, mesh)
    encode: Any = (make_encode_latents if precomputed else make_encode)(bundle, recipe, mesh)
    encoders = {} if precomputed else {name: bundle.weights[name] for name in ENCODERS}
    with reproducible(recipe.dtype):
        made = jax.eval_shape(encode, encoders, inputs)
    rows = NamedSharding(mesh, BATCH)
    examples = jax.tree.map(lambda x: shaped(x.shape, x.dtype, rows), made)
    step = make_step(trained.graph, optimizer, recipe, mesh, shardings)
    resident = bytes_on_a_device(encoders) if not precomputed or config.validation.shards else 0
    kept = bytes_on_a_device((state, trained.frozen))
    batches = AHEAD * bytes_on_a_device(inputs)

    def lower_encode() -> Any:
        with reproducible(recipe.dtype):
            return encode.lower(encoders, inputs)

    def lower_step() -> Any:
        with reproducible(recipe.dtype):
            return step.lower(state, trained.frozen, examples, inputs.numbers)

    tokens = _tokens(recipe)
    sizes: dict[str, Any] = {"text": tokens[0], "image": tokens[1], "condition": tokens[2]}
    lora = {"lora": trained.is_lora, "remat": config.train.remat}
    flops = size * training_flops(bundle.flux_config, **sizes, **lora)
    traffic = flux_bytes(
        bundle.flux_config,
        tokens=sum(tokens),
        samples=size / samples_along(mesh),
        training=True,
        remat=config.train.remat,
        parts=mesh.shape["tensor"] * mesh.shape["sequence"],
    )
    weights = {"transformer": (trained.trainable, trained.frozen)} | encoders
    encoding = 0.0 if precomputed else size * _encoder_flops(config, bundle, recipe)
    return [
        AheadProgram("encode", lower_encode, mesh.size, kept + batches, encoding),
        AheadProgram("step", lower_step, mesh.size, resident + batches, flops, traffic, whole_of(weights)),
    ]


def abstract_trained(config: RunConfig, mesh: Mesh, blocks: tuple[int, int] | None = None) -> Trained:
    """What is trained, of shapes on the mesh."""
    dtype, wanted = jnp.dtype(config.train.dtype), config.trainable
    scan_blocks = scans_blocks(config.train.scan_blocks, mesh)
    bundle = abstract_bundle(config.model, mesh, dtype=dtype, scan_blocks=scan_blocks, blocks=blocks)
    del bundle.weights["transformer"]
    transformer = abstract_flux(bundle.flux_config, dtype)
    if wanted.parameters is None:
        if wanted.lora is not None:
            ranks = corrector_ranks(wanted.lora, transformer)
        else:
            ranks = dict.fromkeys(select(linears(transformer), wanted.pattern), wanted.rank)
        attach_shapes(transformer, ranks if blocks is None else fitting(ranks, transformer))
    graph = FluxGraph.of(transformer, scan_blocks=scan_blocks)
    trainable, frozen, scales = split_moving(transformer, wanted, graph, config.model)
    trainable = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trainable)
    frozen = on_mesh(jax.eval_shape(graph.stacked, frozen), mesh)
    running = on_mesh(jax.eval_shape(graph.stacked, trainable), mesh)
    return Trained(bundle, graph, running, frozen, on_mesh(trainable, mesh), scales)


def _pictures(config: RunConfig, bundle: Bundle, recipe: Recipe, mesh: Mesh) -> Inputs:
    b, rows = config.train.batch_size, NamedSharding(mesh, BATCH)
    good, bad = ((b, size, size, 3) for size in (config.data.target_size, config.data.condition_size))
    arrays = [
        (good, np.uint8),
        (bad, np.uint8),
        ((b, bundle.clip_length), np.int32),
        ((b, recipe.shape.text), np.int32),
    ]
    return Inputs(*(shaped(shape, kind, rows) for shape, kind in [*arrays, ((b,), np.uint32)]))  # pyright: ignore[reportArgumentType]


def _latents(config: RunConfig, bundle: Bundle, recipe: Recipe, mesh: Mesh) -> LatentInputs:
    b, rows = config.train.batch_size, NamedSharding(mesh, BATCH)
    vae, flux = bundle.vae_config, bundle.flux_config

    def posterior(pixels: int) -> Any:
        side = pixels // vae.factor
        return tuple(shaped((b, side, side, vae.latent_channels), jnp.float32, rows) for _ in range(2))

    return LatentInputs(
        posterior(config.data.target_size),
        posterior(config.data.condition_size),
        shaped((b, flux.pooled_projection_dim), recipe.dtype, rows),  # pyright: ignore[reportArgumentType]
        shaped((b, recipe.shape.text, flux.joint_attention_dim), recipe.dtype, rows),  # pyright: ignore[reportArgumentType]
        shaped((b,), np.uint32, rows),  # pyright: ignore[reportArgumentType]
    )


def _tokens(recipe: Recipe) -> tuple[int, int, int]:
    shape = recipe.shape
    return shape.text, shape.image[0] * shape.image[1], shape.condition[0] * shape.condition[1]


def _encoder_flops(config: RunConfig, bundle: Bundle, recipe: Recipe) -> float:
    """Of one sample: T5, CLIP and two pictures."""
    t5 = read_sizes(config.model)[0][components.T5.folder]
    pictures = (config.data.target_size, config.data.condition_size)
    vae = sum(autoencoder_flops(bundle.vae_config, side, side, decode=False) for side in pictures)
    return t5_flops(t5, recipe.shape.text) + encoder_flops(bundle.clip_config, bundle.clip_length) + vae
