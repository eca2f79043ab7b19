"""What fine-tuning leaves: PEFT's adapter, or a whole folder of Transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rflow_jax.models.lora import adapters_of
from rflow_jax.training.qwen.trained import Parts
from rflow_jax.weights.lora.peft import export_adapter, merged
from rflow_jax.weights.qwen import export_qwen, nested_table
from rflow_jax.weights.writing import whole


@dataclass(frozen=True)
class TrainedChat:
    """A Qwen2.5-VL in two parts; an :class:`~rflow_jax.training.checkpoints.Exporter`.

    Attributes:
        base: the folder it began with.
        name: that of the base for other programs: a folder or a Hub id.
        merge: write a whole folder of Transformers.
    """

    parts: Parts
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
        with whole(folder) as partial:
            if self.merge:
                export_qwen(merged(model), self.base, partial)
            else:
                partial.mkdir()
                export_adapter(adapters_of(model), nested_table(model), self.name, partial, task_type="CAUSAL_LM")
