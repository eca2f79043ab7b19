"""Fine-tuning as a task; exports PEFT's adapter, or a whole folder of Transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from rflow_jax.data.sources.chats import ChatFile
from rflow_jax.models.lora import adapters_of
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from rflow_jax.parallel.sharding import sharding_for
from rflow_jax.tokenizers.qwen import QwenTokenizer
from rflow_jax.training.qwen.batches import RowSizes
from rflow_jax.training.qwen.model import ParamPartition, QwenTask, partition_params
from rflow_jax.training.sft.config import SftRunConfig
from rflow_jax.training.sft.loss import ChatInputs, ChatMaker, ChatObjective, weighed
from rflow_jax.training.sft.validation import ChatValidation
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

    def export(self, trainable: nnx.State, folder: Path | None) -> None:
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


class Sft(QwenTask):
    """A :class:`~rflow_jax.training.task.Task`.

    Raises:
        InputError: the model or a setting is not usable.
    """

    title = "a language model"
    records = "chats"

    def __init__(self, config: SftRunConfig, mesh: Mesh):
        self._config = config
        folder = resolve_vlm(config.model)
        source = ChatFile.open(Path(config.data.chats).expanduser())
        held_out = config.validation.chats
        self._held_out = ChatFile.open(Path(held_out).expanduser()) if held_out is not None else None
        tokenizer = QwenTokenizer(folder)

        base = load_qwen(folder, dtype=jnp.dtype(config.train.dtype), sharding_for=sharding_for(mesh))
        sizes, rules = base.config, read_image_processor_config(folder, base.config)
        parts = partition_params(base, config, mesh)
        padded = RowSizes.of(config.data, sizes, rules, pictures=config.data.max_images)
        prepare = QwenProcessor(tokenizer, rules, sizes, padded.tokens, config.data.max_pixels)
        maker = ChatMaker(prepare, padded)
        super().__init__(config, mesh, parts, source, maker, padded)
        self._objective = make_objective(config, parts.graph, sizes, rules)
        name = str(folder.absolute()) if Path(config.model).expanduser().exists() else config.model
        merge = config.sft.merge or config.trainable_parameters is not None
        self.exporter = TrainedChat(parts, folder, name, merge)

    def _compile_step(self, optimizer: optax.GradientTransformation, shardings: Any) -> Any:
        return compile_chat_step(self._config, self._objective, optimizer, shardings, self._mesh)

    def open_validation(self, out: Path) -> ChatValidation | None:
        """Loss on held-out chats."""
        if self._held_out is None:
            return None
        given = self._held_out, self._maker, self._objective, self._parts.frozen
        return ChatValidation(self._config.validation, *given, self._mesh, self.samples_at_once)


def make_objective(
    config: SftRunConfig, graph: nnx.GraphDef, sizes: Qwen25VLConfig, rules: ImageProcessorConfig
) -> ChatObjective:
    """The objective of a model with this graph."""
    return ChatObjective(graph, rules, sizes.vision.unit, config.train.attention, config.train.remat)


def compile_chat_step(
    config: SftRunConfig, objective: ChatObjective, optimizer: optax.GradientTransformation, shardings: Any, mesh: Mesh
) -> Any:
    """Compiles the step of (state, frozen parameters, chats)."""
    parts = config.train.gradient_accumulation_steps
    update = make_update(objective, optimizer, gradient_accumulation_steps=parts, mesh=mesh)

    def whole(state: TrainState, frozen: nnx.State, chats: ChatInputs) -> tuple[TrainState, StepMetrics]:
        return update(state, frozen, weighed(chats, parts))

    return compile_step(whole, shardings, mesh)
