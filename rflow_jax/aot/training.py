"""The programs of training: encoding and step of the corrector, and the steps of ``reward`` and ``sft``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from rflow_jax.aot.estimate import autoencoder_flops, flux_bytes
from rflow_jax.aot.models import abstract_bundle, corrector_ranks, fitting, read_qwen_sizes, read_sizes, whole_of
from rflow_jax.aot.program import AheadProgram, abstract_state, bytes_on_a_device, on_mesh, shaped, whole_in
from rflow_jax.errors import InputError
from rflow_jax.models.flops import encoder_flops, t5_flops
from rflow_jax.models.flux.config import training_flops
from rflow_jax.models.flux.transformer import FluxGraph, abstract_flux
from rflow_jax.models.lora import attach_shapes, linears, select
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from rflow_jax.models.qwen2_5_vl.model import Qwen25VL, abstract_qwen2_5_vl
from rflow_jax.parallel.mesh import BATCH, samples_along
from rflow_jax.parallel.runtime import reproducible
from rflow_jax.training.config import CommonConfig, CorrectorRunConfig
from rflow_jax.training.corrector.latents import LatentInputs, make_encode_latents
from rflow_jax.training.corrector.step import ENCODERS, StepInputs, StepSpec, make_encode, make_step
from rflow_jax.training.corrector.task import make_step_spec
from rflow_jax.training.optimizers import make_optimizer
from rflow_jax.training.partition import PartitionedModel, split_trainable
from rflow_jax.training.prefetch import AHEAD
from rflow_jax.training.qwen.batches import Rows, RowSizes, rows_of
from rflow_jax.training.qwen.config import QwenRunConfig
from rflow_jax.training.qwen.model import ParamPartition, flops_of_sample
from rflow_jax.training.qwen.model import split_trainable as split_moving_qwen
from rflow_jax.training.reward import task as reward
from rflow_jax.training.reward.config import RewardRunConfig
from rflow_jax.training.reward.loss import PairInputs
from rflow_jax.training.sft import task as sft
from rflow_jax.training.sft.config import SftRunConfig
from rflow_jax.training.sft.loss import ChatInputs
from rflow_jax.training.train_state import TrainState
from rflow_jax.vlm.qwen_batching import QwenSample
from rflow_jax.weights import components
from rflow_jax.weights.flux import FluxModel, scans_blocks

# The special token comes after those of the published tokenizer.
_SPECIAL = 151_665


def qwen_training_programs(config: CommonConfig, mesh: Mesh, *, layers: int | None = None) -> list[AheadProgram]:
    """What ``rflow train`` compiles for a step of the task ``reward`` or ``sft`` on this mesh.

    Args:
        layers: of the language model and of the vision tower, for a quick check.

    Raises:
        InputError: another task, a model of unknown sizes, or a setting that is not usable.
    """
    config.train.check_batch(samples_along(mesh))
    if isinstance(config, RewardRunConfig):
        return [_reward(config, mesh, layers)]
    if isinstance(config, SftRunConfig):
        return [_sft(config, mesh, layers)]
    raise InputError(f"task {config.task}: not of a Qwen2.5-VL; reward and sft are")


def _reward(config: RewardRunConfig, mesh: Mesh, layers: int | None) -> AheadProgram:
    sizes, rules = read_qwen_sizes(config.model, layers)
    dtype = jnp.dtype(config.train.dtype)
    last = sizes.language.vocab_size - 1
    special = min(_SPECIAL, last) if config.reward.token == "special" else None
    base = abstract_qwen2_5_vl(sizes, dtype)
    model = nnx.eval_shape(lambda base: reward.begin(base, special, config.train.seed, dtype), base)
    parts = abstract_parts(model, config, mesh, also=reward.HEAD)
    objective = reward.make_objective(config, parts.graph, sizes, rules, special)
    padded, count = RowSizes.of(config.data, sizes, rules, pictures=1), config.train.batch_size
    rows = NamedSharding(mesh, BATCH)
    pairs = PairInputs(
        jax.tree.map(lambda x: shaped((count, 2, *x.shape[1:]), x.dtype, rows), _row(sizes, padded)),
        shaped((count,), np.int32, rows),  # pyright: ignore[reportArgumentType]
        shaped((count, 2), np.float32, rows),  # pyright: ignore[reportArgumentType]
    )
    optimizer = make_optimizer(config.optimizer)
    state, shardings = abstract_state(parts.trainable, optimizer, mesh)
    step = reward.compile_pair_step(config, objective, optimizer, shardings, mesh)
    flops = reward.Reward.rows * flops_of_sample(parts, padded)
    return _program(step, state, parts, pairs, mesh, count * flops)


def _sft(config: SftRunConfig, mesh: Mesh, layers: int | None) -> AheadProgram:
    sizes, rules = read_qwen_sizes(config.model, layers)
    parts = abstract_parts(abstract_qwen2_5_vl(sizes, jnp.dtype(config.train.dtype)), config, mesh)
    objective = sft.make_objective(config, parts.graph, sizes, rules)
    padded, count = RowSizes.of(config.data, sizes, rules, pictures=config.data.max_images), config.train.batch_size
    rows = NamedSharding(mesh, BATCH)
    chats = ChatInputs(
        jax.tree.map(lambda x: shaped((count, *x.shape[1:]), x.dtype, rows), _row(sizes, padded)),
        shaped((count, padded.tokens), np.float32, rows),  # pyright: ignore[reportArgumentType]
    )
    optimizer = make_optimizer(config.optimizer)
    state, shardings = abstract_state(parts.trainable, optimizer, mesh)
    step = sft.compile_chat_step(config, objective, optimizer, shardings, mesh)
    flops = flops_of_sample(parts, padded)
    return _program(step, state, parts, chats, mesh, count * flops)


def abstract_parts(model: Qwen25VL, config: QwenRunConfig, mesh: Mesh, *, also: str = "") -> ParamPartition:
    """The shapes of :func:`rflow_jax.training.qwen.model.partition_params`."""
    if (lora := config.lora).target_modules is not None:
        attach_shapes(model, dict.fromkeys(select(linears(model), lora.target_modules), lora.rank))
    graph, trainable, frozen = split_moving_qwen(model, config.trainable_parameters, also)
    trainable = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trainable)
    return ParamPartition(graph, on_mesh(trainable, mesh), on_mesh(frozen, mesh))


def _row(config: Qwen25VLConfig, sizes: RowSizes) -> Rows:
    """A batch of one empty row."""
    return rows_of([QwenSample(np.zeros(1, np.int32))], config, pad=0, sizes=sizes)


def _program(step: Any, state: TrainState, parts: ParamPartition, batch: Any, mesh: Mesh, flops: float) -> AheadProgram:
    whole = whole_in(nnx.merge_state(parts.trainable, parts.frozen))
    waiting = AHEAD * bytes_on_a_device(batch)
    return AheadProgram("step", lambda: step.lower(state, parts.frozen, batch), mesh.size, waiting, flops, whole=whole)


def training_programs(
    config: CorrectorRunConfig, mesh: Mesh, *, blocks: tuple[int, int] | None = None
) -> list[AheadProgram]:
    """What ``rflow train`` compiles for the corrector on this mesh.

    Args:
        blocks: numbers of double and single blocks, for a quick check.

    Raises:
        InputError: the model or a setting is not usable.
    """
    config.train.check_batch(samples_along(mesh))
    trained = abstract_trained(config, mesh, blocks)
    recipe, optimizer = make_step_spec(config, trained), make_optimizer(config.optimizer)
    state, shardings = abstract_state(trained.trainable, optimizer, mesh)
    precomputed = config.data.format == "precomputed"
    flux, size = trained.bundle, config.train.batch_size
    inputs = (_latents if precomputed else _images)(config, flux, recipe, mesh)
    encode: Any = (make_encode_latents if precomputed else make_encode)(flux, recipe, mesh)
    encoders = {} if precomputed else {name: flux.weights[name] for name in ENCODERS}
    with reproducible(recipe.dtype):
        encoded = jax.eval_shape(encode, encoders, inputs)
    rows = NamedSharding(mesh, BATCH)
    examples = jax.tree.map(lambda x: shaped(x.shape, x.dtype, rows), encoded)
    step = make_step(trained.graph, optimizer, recipe, mesh, shardings)
    resident = bytes_on_a_device(encoders) if not precomputed or config.validation.path else 0
    kept = bytes_on_a_device((state, trained.frozen))
    batches = AHEAD * bytes_on_a_device(inputs)

    def lower_encode() -> Any:
        with reproducible(recipe.dtype):
            return encode.lower(encoders, inputs)

    def lower_step() -> Any:
        with reproducible(recipe.dtype):
            return step.lower(state, trained.frozen, examples, inputs.numbers)

    tokens = {
        "text": recipe.shape.text,
        "image": recipe.shape.image[0] * recipe.shape.image[1],
        "condition": recipe.shape.condition[0] * recipe.shape.condition[1],
    }
    remat, is_lora = config.train.remat, trained.is_lora
    flops = size * training_flops(flux.flux_config, **tokens, lora=is_lora, remat=remat)
    traffic = flux_bytes(
        flux.flux_config,
        tokens=sum(tokens.values()),
        samples=size / samples_along(mesh),
        training=True,
        remat=remat,
        parts=mesh.shape["tensor"] * mesh.shape["sequence"],
    )
    weights = {"transformer": (trained.trainable, trained.frozen)} | encoders
    encoding = 0.0 if precomputed else size * _encoder_flops(config, flux, recipe)
    return [
        AheadProgram("encode", lower_encode, mesh.size, kept + batches, encoding),
        AheadProgram("step", lower_step, mesh.size, resident + batches, flops, traffic, whole_of(weights)),
    ]


def abstract_trained(config: CorrectorRunConfig, mesh: Mesh, blocks: tuple[int, int] | None = None) -> PartitionedModel:
    """The partitioned model, as shapes on the mesh."""
    dtype, lora = jnp.dtype(config.train.dtype), config.lora
    scan_blocks = scans_blocks(config.train.scan_blocks, mesh)
    flux = abstract_bundle(config.model, mesh, dtype=dtype, scan_blocks=scan_blocks, blocks=blocks)
    del flux.weights["transformer"]
    transformer = abstract_flux(flux.flux_config, dtype)
    if config.trainable_parameters is None:
        if lora.init_from is not None:
            ranks = corrector_ranks(lora.init_from, transformer)
        else:
            ranks = dict.fromkeys(select(linears(transformer), lora.target_modules), lora.rank)
        attach_shapes(transformer, ranks if blocks is None else fitting(ranks, transformer))
    graph = FluxGraph.of(transformer, scan_blocks=scan_blocks)
    trainable, frozen, scales = split_trainable(transformer, config.trainable_parameters, graph, config.model)
    trainable = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trainable)
    frozen = on_mesh(jax.eval_shape(graph.stacked, frozen), mesh)
    running = on_mesh(jax.eval_shape(graph.stacked, trainable), mesh)
    return PartitionedModel(flux, graph, running, frozen, on_mesh(trainable, mesh), scales)


def _images(config: CorrectorRunConfig, flux: FluxModel, recipe: StepSpec, mesh: Mesh) -> StepInputs:
    b, rows = config.train.batch_size, NamedSharding(mesh, BATCH)
    good, bad = ((b, side, side, 3) for side in (config.data.target_size, config.data.condition_size))
    arrays = [(good, np.uint8), (bad, np.uint8), ((b, flux.clip_length), np.int32), ((b, recipe.shape.text), np.int32)]
    return StepInputs(*(shaped(shape, kind, rows) for shape, kind in [*arrays, ((b,), np.uint32)]))  # pyright: ignore[reportArgumentType]


def _latents(config: CorrectorRunConfig, flux: FluxModel, recipe: StepSpec, mesh: Mesh) -> LatentInputs:
    b, rows = config.train.batch_size, NamedSharding(mesh, BATCH)
    vae, sizes = flux.vae_config, flux.flux_config

    def posterior(pixels: int) -> Any:
        side = pixels // vae.factor
        return tuple(shaped((b, side, side, vae.latent_channels), jnp.float32, rows) for _ in range(2))

    return LatentInputs(
        posterior(config.data.target_size),
        posterior(config.data.condition_size),
        shaped((b, sizes.pooled_projection_dim), recipe.dtype, rows),  # pyright: ignore[reportArgumentType]
        shaped((b, recipe.shape.text, sizes.joint_attention_dim), recipe.dtype, rows),  # pyright: ignore[reportArgumentType]
        shaped((b,), np.uint32, rows),  # pyright: ignore[reportArgumentType]
    )


def _encoder_flops(config: CorrectorRunConfig, flux: FluxModel, recipe: StepSpec) -> float:
    """Of one sample: T5, CLIP and two sides."""
    t5 = read_sizes(config.model)[0][components.T5.folder]
    sides = (config.data.target_size, config.data.condition_size)
    vae = sum(autoencoder_flops(flux.vae_config, side, side, decode=False) for side in sides)
    return t5_flops(t5, recipe.shape.text) + encoder_flops(flux.clip_config, flux.clip_length) + vae
