"""Sizes of a Qwen2 language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from rflow_jax.errors import InputError

_KINDS = ("qwen2", "qwen2_5_vl", "qwen2_5_vl_text")
_PLAIN_ROPE = (None, "default", "mrope")
_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Qwen2Config:
    """Sizes, in the names of Transformers' ``config.json``; the defaults are those of Qwen2.5-VL-7B's text part.

    Attributes:
        mrope_section: channel pairs of a head turned by each axis (time, row, column) of multimodal positions; empty
            for positions of one axis.
    """

    vocab_size: int = 152_064
    hidden_size: int = 3584
    intermediate_size: int = 18_944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 128_000
    mrope_section: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise InputError(f"language model config: {name} is {getattr(self, name)}; expected a number above 0")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise InputError(
                f"language model config: hidden_size {self.hidden_size} does not give {self.num_attention_heads} heads "
                "of even width"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"language model config: num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.mrope_section and 2 * sum(self.mrope_section) != self.head_dim:
            raise InputError(
                f"language model config: mrope_section {list(self.mrope_section)} must add up to half of the head's "
                f"{self.head_dim} channels"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Qwen2Config:
        """From the content of a ``config.json``, in the layout of Transformers 4 or 5.

        Raises:
            InputError: another network, or an unsupported variant (sliding windows, scaled rotary angles).
        """
        if (kind := config.get("model_type", "qwen2")) not in _KINDS:
            raise InputError(f"language model config: model_type {kind!r} is not supported, only {', '.join(_KINDS)}")
        if config.get("hidden_act", "silu") != "silu":
            raise InputError(f"language model config: hidden_act {config['hidden_act']!r}; Qwen2 has 'silu'")
        layers = config.get("layer_types")
        sliding = isinstance(layers, list) and "sliding_attention" in layers
        if not layers and config.get("use_sliding_window"):
            first, count = config.get("max_window_layers"), config.get("num_hidden_layers")
            sliding = type(first) is not int or first < (count or cls.num_hidden_layers)
        if sliding:
            raise InputError("language model config: layers with a sliding window are not supported")
        known: dict[str, Any] = {key: config[key] for key in cls.__dataclass_fields__ if config.get(key) is not None}
        known |= _rope_in(config)
        known.setdefault("num_key_value_heads", known.get("num_attention_heads", cls.num_attention_heads))
        return cls(**known)


def _rope_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of rotary positions, in any version's layout of ``config.json``."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"language model config: rope_scaling is {rope!r}; expected an object with keys")
    if (scaling := rope.get("rope_type", rope.get("type"))) not in _PLAIN_ROPE:
        raise InputError(f"language model config: rotary angles of type {scaling!r} are not supported")
    theta = rope.get("rope_theta") or config.get("rope_theta") or Qwen2Config.rope_theta
    if type(theta) not in (int, float) or not 0 < theta < inf:
        raise InputError(f"language model config: rope_theta is {theta!r}; expected a number above 0")
    section = rope.get("mrope_section") or []
    if not isinstance(section, list) or not all(type(pairs) is int and pairs > 0 for pairs in section):
        raise InputError(
            f"language model config: mrope_section is {section!r}; expected a list of whole numbers above 0"
        )
    return {"rope_theta": float(theta), "mrope_section": tuple(section)}
