"""The step of the tasks that train a Qwen2.5-VL, ``reward`` and ``sft``, of a real configuration."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from rflow_jax.aot.placed import abstract_state, on_mesh, whole_in
from rflow_jax.aot.program import AheadProgram, bytes_on_a_device, shaped
from rflow_jax.aot.vlm import read_qwen_sizes
from rflow_jax.errors import InputError
from rflow_jax.models.lora import attach_shapes, linears, select
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from rflow_jax.models.qwen2_5_vl.model import Qwen25VL, abstract_qwen2_5_vl
from rflow_jax.parallel.mesh import BATCH, samples_along
from rflow_jax.training.config import CommonConfig
from rflow_jax.training.feed import AHEAD
from rflow_jax.training.optimizers import make_optimizer
from rflow_jax.training.qwen.config import QwenTrainableConfig
from rflow_jax.training.qwen.rows import Rows, RowSizes, rows_of
from rflow_jax.training.qwen.trained import Parts, flops_of_sample, split_moving
from rflow_jax.training.reward import task as reward
from rflow_jax.training.reward.batches import PairInputs
from rflow_jax.training.reward.config import RewardRunConfig
from rflow_jax.training.sft import task as sft
from rflow_jax.training.sft.batches import ChatInputs
from rflow_jax.training.sft.config import SftRunConfig
from rflow_jax.training.update import State
from rflow_jax.vlm.qwen_inputs import Sample

# The special token comes after those of the published tokenizer.
_SPECIAL = 151_665


def qwen_training_programs(config: CommonConfig, mesh: Mesh, *, layers: int | None = None) -> list[AheadProgram]:
    """What ``train.py`` compiles for a step of this configuration on this mesh.

    Args:
        layers: so many of the language model and of the vision tower, for a quick check.

    Raises:
        InputError: another task, a model whose sizes are not known, or a setting that is not usable.
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
    parts = abstract_parts(model, config.trainable, mesh, also=reward.HEAD)
    objective = reward.make_objective(config, parts.graph, sizes, rules, special)
    padded, count = reward.row_sizes(config, sizes, rules), config.train.batch_size
    places = NamedSharding(mesh, BATCH)
    pairs = PairInputs(
        jax.tree.map(lambda x: shaped((count, 2, *x.shape[1:]), x.dtype, places), _row(sizes, padded)),
        shaped((count,), np.int32, places),  # pyright: ignore[reportArgumentType]
        shaped((count, 2), np.float32, places),  # pyright: ignore[reportArgumentType]
    )
    optimizer = make_optimizer(config.optimizer)
    state, shardings = abstract_state(parts.trainable, optimizer, mesh)
    step = reward.compile_pair_step(config, objective, optimizer, shardings, mesh)
    flops = 2 * flops_of_sample(parts, sizes, tokens=padded.tokens, patches=padded.patches, pictures=1)
    return _program(step, state, parts, pairs, mesh, count * flops)


def _sft(config: SftRunConfig, mesh: Mesh, layers: int | None) -> AheadProgram:
    sizes, rules = read_qwen_sizes(config.model, layers)
    parts = abstract_parts(abstract_qwen2_5_vl(sizes, jnp.dtype(config.train.dtype)), config.trainable, mesh)
    objective = sft.make_objective(config, parts.graph, sizes, rules)
    padded, count = sft.row_sizes(config, sizes, rules), config.train.batch_size
    places = NamedSharding(mesh, BATCH)
    chats = ChatInputs(
        jax.tree.map(lambda x: shaped((count, *x.shape[1:]), x.dtype, places), _row(sizes, padded)),
        shaped((count, padded.tokens), np.float32, places),  # pyright: ignore[reportArgumentType]
    )
    optimizer = make_optimizer(config.optimizer)
    state, shardings = abstract_state(parts.trainable, optimizer, mesh)
    step = sft.compile_chat_step(config, objective, optimizer, shardings, mesh)
    how = {"tokens": padded.tokens, "patches": padded.patches, "pictures": padded.pictures}
    return _program(step, state, parts, chats, mesh, count * flops_of_sample(parts, sizes, **how))


def abstract_parts(model: Qwen25VL, config: QwenTrainableConfig, mesh: Mesh, *, also: str = "") -> Parts:
    """As :func:`rflow_jax.training.qwen.trained.take_apart`, of shapes."""
    if config.pattern is not None:
        attach_shapes(model, dict.fromkeys(select(linears(model), config.pattern), config.rank))
    graph, trainable, frozen = split_moving(model, config, also)
    trainable = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trainable)
    return Parts(graph, on_mesh(trainable, mesh), on_mesh(frozen, mesh))


def _row(config: Qwen25VLConfig, sizes: RowSizes) -> Rows:
    """A batch of one row, which holds nothing."""
    return rows_of([Sample(np.zeros(1, np.int32))], config, pad=0, sizes=sizes)


def _program(step: Any, state: State, parts: Parts, batch: Any, mesh: Mesh, flops: float) -> AheadProgram:
    whole = whole_in(nnx.merge_state(parts.trainable, parts.frozen))
    waiting = AHEAD * bytes_on_a_device(batch)
    return AheadProgram("step", lambda: step.lower(state, parts.frozen, batch), mesh.size, waiting, flops, whole=whole)
