"""A Qwen2.5-VL split into trainable and frozen parameters, and what the tasks that train one share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from rflow_jax.errors import InputError
from rflow_jax.models.lora import init_lora
from rflow_jax.models.qwen2_5_vl.model import Qwen25VL
from rflow_jax.parallel.mesh import put_batch
from rflow_jax.parallel.sharding import sharding_for
from rflow_jax.training.corrector.step import INIT
from rflow_jax.training.partition import dotted, on_host, shard_state
from rflow_jax.training.prefetch import slots_here
from rflow_jax.training.qwen.batches import ArrayBatch, ArrayLoader, Collator, RowSizes, SampleSource, open_array_loader
from rflow_jax.training.qwen.config import QwenRunConfig
from rflow_jax.training.task import TrainStep
from rflow_jax.training.train_state import StepMetrics, TrainState

# The tower's query, key and value are one matrix in a checkpoint, so they cannot have separate adapters.
_FUSED = r"vision\.blocks\.\d+\.attn\.[qkv]"


class ParamPartition(NamedTuple):
    """A network in two parts.

    Attributes:
        graph: to be merged with both.
        trainable: the trained parameters, float32.
        frozen: the others, as they were loaded.
    """

    graph: nnx.GraphDef
    trainable: nnx.State
    frozen: nnx.State

    def merged(self, trainable: nnx.State) -> Any:
        """The network with these parameters, to be exported; every process must call it.

        The frozen part stays on the devices if this process reaches all of it, since little of it may be needed.
        """
        one = jax.process_count() == 1
        # New variables around the same arrays: setting a variable of the network does not change ours.
        frozen = jax.tree.map(lambda x: x, self.frozen) if one else on_host(self.frozen)
        return nnx.merge(self.graph, on_host(trainable), frozen)


def first_key(seed: int) -> jax.Array:
    """The key of all draws before the first step."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), INIT)


def partition_params(model: Qwen25VL, config: QwenRunConfig, mesh: Mesh, *, also: str = "") -> ParamPartition:
    """Attaches a fresh LoRA and splits the network into trainable and frozen parameters, on the mesh.

    Args:
        also: regular expression on dotted parameter paths: these are trained whatever ``config`` says.

    Raises:
        InputError: a pattern matches nothing, or a linear that cannot have a LoRA.
    """
    put = sharding_for(mesh)
    if (lora := config.lora).target_modules is not None:
        rngs = nnx.Rngs(params=first_key(config.train.seed))
        init_lora(model, lora.rank, alpha=lora.alpha, pattern=lora.target_modules, rngs=rngs, sharding_for=put)
    graph, trainable, frozen = split_trainable(model, config.trainable_parameters, also)
    # Steps are far below bfloat16's resolution: trained parameters are float32, and rounded where they are used.
    trainable = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
    return ParamPartition(graph, shard_state(trainable, put), shard_state(frozen, put))


def split_trainable(model: Qwen25VL, parameters: str | None, also: str = "") -> tuple[Any, Any, Any]:
    """(graph, trainable, frozen) of a network, of arrays or of shapes; see :func:`partition_params`."""
    named = re.compile(parameters or "")

    def is_trained(path: Any, variable: Any) -> bool:
        name = dotted(path)
        if isinstance(variable, nnx.LoRAParam):
            module = name.rpartition(".")[0]
            if re.fullmatch(_FUSED, module):
                raise InputError(
                    f"lora.target_modules: {module} can have no LoRA, since a checkpoint holds query, key and value of "
                    "the vision tower as one matrix; take its out, ff.gate, ff.up and ff.down, or name its parameters "
                    "in trainable_parameters"
                )
            return True
        return isinstance(variable, nnx.Param) and bool(named.fullmatch(name) or re.fullmatch(also, name))

    graph, trainable, frozen = nnx.split(model, is_trained, ...)
    paths = [dotted(path) for path, _ in nnx.to_flat_state(trainable)]
    if parameters is not None and not any(named.fullmatch(path) for path in paths):
        raise InputError(f"trainable_parameters: {parameters!r} matches no parameter")
    return graph, trainable, frozen


def flops_of_sample(parts: ParamPartition, row: RowSizes) -> float:
    """Floating-point operations of a sample, forward and backward, counting only products with weights.

    Frozen weights get no gradient, and a frozen vision tower has no backward pass at all.
    """
    weights: dict[str, int] = {"vision": 0, "language": 0}
    for state in (parts.trainable, parts.frozen):
        for path, leaf in nnx.to_flat_state(state):
            if path[0] in weights and leaf.get_value().ndim > 1 and "embed" not in path:
                weights[str(path[0])] += leaf.get_value().size
    trained = nnx.to_flat_state(parts.trainable)
    lora_only = all(isinstance(leaf, nnx.LoRAParam) for _, leaf in trained)
    language = 2 * weights["language"] * row.tokens * (2 if lora_only else 3)
    passes = 2 if any(path[0] == "vision" for path, _ in trained) else 1
    vision = 2 * weights["vision"] * row.patches * row.pictures * passes
    return float(language + vision)


class QwenTask:
    """The part of a :class:`~rflow_jax.training.task.Task` that all tasks on a Qwen2.5-VL share.

    Attributes:
        records: what a sample is called.
        rows: of a sample in a batch.
    """

    records: ClassVar[str]
    rows: ClassVar[int] = 1

    def __init__(
        self,
        config: QwenRunConfig,
        mesh: Mesh,
        parts: ParamPartition,
        source: SampleSource,
        maker: Collator,
        sizes: RowSizes,
    ):
        self._mesh, self._parts, self._source, self._maker, self._sizes = mesh, parts, source, maker, sizes
        self._train, self._data = config.train, config.data
        self.trainable = parts.trainable

    @cached_property
    def flops(self) -> float:
        """Of a sample."""
        return self.rows * flops_of_sample(self._parts, self._sizes)

    @property
    def samples_at_once(self) -> int:
        """Samples of a part of a batch."""
        return self._train.batch_size // self._train.gradient_accumulation_steps

    def to_saved(self, state: TrainState) -> TrainState:
        """The state as it is."""
        return state

    def to_running(self, state: TrainState) -> TrainState:
        """The state as it is."""
        return state

    def open_loader(self, start: int, position: Mapping[str, Any] | None) -> ArrayLoader:
        """Batches from a step on."""
        seed, batch_size = self._train.seed, self._train.batch_size
        options = {"seed": seed, "batch_size": batch_size, "slots": slots_here(self._mesh, batch_size)}
        given = self._source, self._maker, self._data
        return open_array_loader(*given, start=start, position=position, name=self.records, **options)

    def put(self, batch: ArrayBatch) -> Any:
        """The inputs on the mesh."""
        return put_batch(self._mesh, batch.inputs)

    def make_step(self, optimizer: optax.GradientTransformation, shardings: Any) -> TrainStep:
        """Updates the parameters by the loss of a batch."""
        step, frozen = self._compile_step(optimizer, shardings), self._parts.frozen

        def take(state: TrainState, inputs: Any) -> tuple[TrainState, StepMetrics]:
            return step(state, frozen, inputs)

        return take

    def _compile_step(self, optimizer: optax.GradientTransformation, shardings: Any) -> Any:
        """A jitted function of (state, frozen parameters, inputs)."""
        raise NotImplementedError
