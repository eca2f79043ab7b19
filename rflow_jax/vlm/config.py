"""The settings of a Qwen2.5-VL that answers questions about pictures, in this process."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Literal

from rflow_jax.errors import InputError
from rflow_jax.utils.checks import require_dtype

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
    batch_size: int = 8
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float | None = None
    seed: int = 0
    max_pixels: int | None = None
    devices: tuple[int, ...] | None = None
    quantization: Quantization | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        require_dtype(self.dtype)
        for name in ("batch_size", "max_new_tokens", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                null = ", or null" if name == "max_pixels" else ""
                raise InputError(f"{name} is {value}; expected at least 1{null}")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; expected a whole number from 0")
        if not 0 <= self.temperature < inf:
            raise InputError(f"temperature is {self.temperature}; expected a finite number from 0")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; expected a number above 0 and up to 1")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < inf:
            raise InputError(f"repetition_penalty is {self.repetition_penalty}; expected a finite number above 0")
