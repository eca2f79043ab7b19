"""Fine-tuning as a task; exports PEFT's adapter, or a whole folder of Transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from rflow_jax.data.sources.chats import ChatFile
from rflow_jax.models.lora import adapters_of
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from rflow_jax.parallel.mesh import put_batch
from rflow_jax.parallel.sharding import sharding_for
from rflow_jax.tokenizers.qwen import QwenTokenizer
from rflow_jax.training.prefetch import slots_here
from rflow_jax.training.qwen.batches import ArrayBatch, ArrayLoader, RowSizes, open_array_loader
from rflow_jax.training.qwen.model import ParamPartition, flops_of_sample, partition_params
from rflow_jax.training.sft.config import SftRunConfig
from rflow_jax.training.sft.loss import ChatInputs, ChatMaker, ChatObjective, weighed
from rflow_jax.training.sft.validation import ChatValidation
from rflow_jax.training.task import TrainStep
from rflow_jax.training.train_state import StepMetrics, TrainState, compile_step, make_update
from rflow_jax.vlm.qwen_processing import ImageProcessorConfig, QwenProcessor, read_image_processor_config
from rflow_jax.weights.hub import resolve_vlm
from rflow_jax.weights.lora.peft import export_adapter, merged
from rflow_jax.weights.qwen import export_qwen, load_qwen, nested_table
from rflow_jax.weights.saving import atomic_output


@dataclass(frozen=True)
class TrainedChat:
    """A Qwen2.5-VL in two parts; an :class:`~rflow_jax.training.checkpoints.Exporter`.

    Attributes:
        base: the folder of the base model.
        name: of the base model for other programs: a folder or a Hub id.
        merge: write a whole folder of Transformers.
    """

    parts: ParamPartition
    base: Path
    name: str
    merge: bool

    @property
    def exports(self) -> str:
        return "model/{step}" if self.merge else "adapter/{step}"

    def export(self, trainable: Any, folder: Path | None) -> None:
        """Writes ``adapter/{step}``, or ``model/{step}`` with everything."""
        model = self.parts.merged(trainable)
        if folder is None:
            return
        with atomic_output(folder) as partial:
            if self.merge:
                export_qwen(merged(model), self.base, partial)
            else:
                partial.mkdir()
                export_adapter(adapters_of(model), nested_table(model), self.name, partial, task_type="CAUSAL_LM")


class Sft:
    """A :class:`~rflow_jax.training.task.Task`.

    Raises:
        InputError: the model or a setting is not usable.
    """

    title = "a language model"

    def __init__(self, config: SftRunConfig, mesh: Mesh):
        self._config, self._mesh = config, mesh
        folder = resolve_vlm(config.model)
        self._source = ChatFile.open(Path(config.data.chats).expanduser())
        held_out = config.validation.chats
        self._held_out = ChatFile.open(Path(held_out).expanduser()) if held_out is not None else None
        tokenizer = QwenTokenizer(folder)

        base = load_qwen(folder, dtype=jnp.dtype(config.train.dtype), sharding_for=sharding_for(mesh))
        sizes, rules = base.config, read_image_processor_config(folder, base.config)
        parts = partition_params(base, config, mesh)
        self._sizes = row_sizes(config, sizes, rules)
        prepare = QwenProcessor(tokenizer, rules, sizes, self._sizes.tokens, config.data.max_pixels)
        self._maker = ChatMaker(prepare, self._sizes)
        self._objective = make_objective(config, parts.graph, sizes, rules)
        name = str(folder.absolute()) if Path(config.model).expanduser().exists() else config.model
        merge = config.sft.merge or config.trainable_parameters is not None
        self.exporter = TrainedChat(parts, folder, name, merge)
        self.trainable = parts.trainable

    @cached_property
    def flops(self) -> float:
        """Of a chat."""
        sizes, config = self._sizes, self._maker.prepare.config
        counts = {"tokens": sizes.tokens, "patches": sizes.patches, "pictures": sizes.pictures}
        return flops_of_sample(self.exporter.parts, config, **counts)

    def to_saved(self, state: TrainState) -> TrainState:
        """The state as it is."""
        return state

    def to_running(self, state: TrainState) -> TrainState:
        """The state as it is."""
        return state

    def open_loader(self, start: int, position: Mapping[str, Any] | None) -> ArrayLoader:
        """Batches of chats from a step on."""
        train, data = self._config.train, self._config.data
        slots = slots_here(self._mesh, train.batch_size)
        options = {"seed": train.seed, "batch_size": train.batch_size, "slots": slots, "name": "chats"}
        return open_array_loader(self._source, self._maker, data, start=start, position=position, **options)

    def put(self, batch: ArrayBatch) -> ChatInputs:
        """Chats on the mesh."""
        return put_batch(self._mesh, batch.inputs)

    def make_step(self, optimizer: Any, shardings: Any) -> TrainStep:
        """Predicts the answers' tokens, then updates the parameters."""
        step = compile_chat_step(self._config, self._objective, optimizer, shardings, self._mesh)
        frozen = self.exporter.parts.frozen

        def take(state: TrainState, inputs: ChatInputs) -> tuple[TrainState, StepMetrics]:
            return step(state, frozen, inputs)

        return take

    def open_validation(self, out: Path) -> ChatValidation | None:
        """Loss on held-out chats."""
        config, source = self._config.validation, self._held_out
        if source is None:
            return None
        batch = self._config.train.batch_size // self._config.train.gradient_accumulation_steps
        frozen = self.exporter.parts.frozen
        return ChatValidation(config, source, self._maker, self._objective, frozen, self._mesh, batch)


def row_sizes(config: SftRunConfig, sizes: Qwen25VLConfig, rules: ImageProcessorConfig) -> RowSizes:
    """The sizes that a chat is padded to."""
    data = config.data
    tokens = min(data.max_tokens, sizes.language.max_position_embeddings)
    limits = {"max_pixels": data.max_pixels, "max_ratio": data.max_ratio}
    return RowSizes.of(sizes.vision, rules, tokens=tokens, pictures=data.max_images, **limits)


def make_objective(
    config: SftRunConfig, graph: Any, sizes: Qwen25VLConfig, rules: ImageProcessorConfig
) -> ChatObjective:
    """The objective of a model with this graph."""
    return ChatObjective(graph, rules, sizes.vision.unit, config.train.attention, config.train.remat)


def compile_chat_step(
    config: SftRunConfig, objective: ChatObjective, optimizer: Any, shardings: Any, mesh: Mesh
) -> Any:
    """Compiles the step of (state, frozen parameters, chats)."""
    parts = config.train.gradient_accumulation_steps
    update = make_update(objective, optimizer, accumulation=parts, mesh=mesh)

    def whole(state: TrainState, frozen: Any, chats: ChatInputs) -> tuple[TrainState, StepMetrics]:
        return update(state, frozen, weighed(chats, parts))

    return compile_step(whole, shardings, mesh)
