"""The settings of a Qwen2.5-VL that answers questions about pictures, in this process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rflow_jax.utils.checks import require_dtype
from rflow_jax.utils.ranges import (
    BatchSize,
    DeviceId,
    Pixels,
    Positive,
    Seed,
    Temperature,
    Tokens,
    TopP,
    require_ranges,
)

CHECKPOINT = {"needs": "name the checkpoint, a folder or a Hub id"}
"""Metadata of a field ``model`` without a default."""

Quantization = Literal["int8", "fp8"]


@dataclass(frozen=True)
class QwenChatConfig:
    """A model that answers, and its decoding.

    Attributes:
        model: a folder of Transformers or of ``rflow convert qwen``, or a Hub id.
        dtype: number type of the weights and activations, bfloat16 or float32.
        batch_size: questions answered at once; the last batch is filled up.
        max_new_tokens: of an answer.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_p: drawn from the likeliest tokens that together have this probability.
        repetition_penalty: makes tokens of the question and of the answer so far less likely; 1 is off. null: the value
            of the model's ``generation_config.json``.
        seed: of the drawing; an answer depends on it and on its question only.
        max_pixels: of a picture; null: the model's own limit.
        devices: JAX's numbers of the devices that the model takes for itself; several share its weights. null: the
            first device, shared with other models.
        quantization: int8 or fp8: the language model's weights in 8 bits.
        adapter: folder of a LoRA that PEFT or ``rflow train`` (task ``sft``) wrote; it is added to the weights.
    """

    model: str = field(metadata=CHECKPOINT)
    dtype: str = "bfloat16"
    batch_size: BatchSize = 8
    max_new_tokens: Tokens = 256
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    repetition_penalty: Positive | None = None
    seed: Seed = 0
    max_pixels: Pixels | None = None
    devices: tuple[DeviceId, ...] | None = None
    quantization: Quantization | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        require_dtype(self.dtype)
        require_ranges(self)
