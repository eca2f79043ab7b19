"""What reward training leaves: the original's checkpoint, for the verifier ``reward``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flax import nnx

from rflow_jax.training.model import dotted
from rflow_jax.training.qwen.trained import Parts
from rflow_jax.vlm.qwen_text import QwenTokenizer
from rflow_jax.weights.reward.export import RewardExport, export_reward


@dataclass
class TrainedReward:
    """A reward model in two parts; an :class:`~rflow_jax.training.checkpoints.Exporter`.

    Attributes:
        measure: parameters -> mean and deviation of rewards, to normalise scores by; None: they stay as they are.
    """

    parts: Parts
    what: RewardExport
    tokenizer: QwenTokenizer
    measure: Callable[[Any], tuple[float, float]] | None = None
    exports = "reward/checkpoint-{step}"

    def export(self, trainable: Any, folder: Path | None) -> None:
        """Writes ``reward/checkpoint-N``, and ``reward/model_config.json`` beside it."""
        what = self.what
        if self.measure is not None:
            mean, std = self.measure(trainable)
            what = replace(what, config=replace(what.config, mean=mean, std=std))
        model = self.parts.merged(trainable)
        if folder is not None:
            moved = {dotted(path) for path, leaf in nnx.to_flat_state(trainable) if not isinstance(leaf, nnx.LoRAParam)}
            export_reward(model, moved, what, self.tokenizer.save, folder)
