"""Floating-point operations of encoders: those of matrix products, a multiplication and an addition as two."""

from __future__ import annotations

from rflow_jax.models.clip import ClipVisionConfig
from rflow_jax.models.siglip import SiglipVisionConfig
from rflow_jax.models.text_encoders import ClipTextConfig, T5Config


def t5_flops(config: T5Config, tokens: int) -> float:
    """Operations of T5's encoder for one prompt: four projections, a gated feed-forward, attention."""
    inner = config.num_heads * config.d_kv
    weights = config.d_model * (4 * inner + 3 * config.d_ff)
    return float(config.num_layers * (2 * tokens * weights + 4 * tokens * tokens * inner))


def encoder_flops(config: ClipTextConfig | ClipVisionConfig | SiglipVisionConfig, tokens: int) -> float:
    """Operations of a plain transformer encoder's blocks for one sample; CLIP's causal attention is computed whole."""
    d, m = config.hidden_size, config.intermediate_size
    return float(config.num_hidden_layers * (2 * tokens * (4 * d * d + 2 * d * m) + 4 * tokens * tokens * d))
