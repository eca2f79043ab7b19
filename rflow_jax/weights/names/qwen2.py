"""Qwen2's names in Transformers' checkpoints."""

from __future__ import annotations

import re

from rflow_jax.weights.tables import Rule, Table

_LAYER = r"layers.\1"
HEAD = "lm_head"


def rules(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The rules of the decoder without its head.

    Args:
        ours: what stands before our paths, such as ``language.``.
        theirs: what stands before the checkpoint's keys, such as ``model.``.
    """
    own, layer = re.escape(ours), theirs + _LAYER
    return (
        Rule(own + r"embed", theirs + r"embed_tokens"),
        Rule(own + r"blocks\.(\d+)\.attn_norm", layer + r".input_layernorm"),
        Rule(own + r"blocks\.(\d+)\.attn\.([qkv])", layer + r".self_attn.\2_proj"),
        Rule(own + r"blocks\.(\d+)\.attn\.out", layer + r".self_attn.o_proj"),
        Rule(own + r"blocks\.(\d+)\.ff_norm", layer + r".post_attention_layernorm"),
        Rule(own + r"blocks\.(\d+)\.ff\.(gate|up|down)", layer + r".mlp.\2_proj"),
        Rule(own + r"final_norm", theirs + r"norm"),
    )


# Tied models' files hold the head as a copy of the embedding, or not at all; old files hold the rotary frequencies.
_CONSTANT = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
TRANSFORMERS = Table("Qwen2", (*rules("", "model."), Rule(r"head", HEAD)), ignore=(_CONSTANT,))
HEADLESS = Table("Qwen2", rules("", "model."), ignore=(_CONSTANT, rf"{HEAD}\.weight"))


def table_for(*, head: bool) -> Table:
    """The table of a decoder that has its own head, or takes its embedding for one (or needs none)."""
    return TRANSFORMERS if head else HEADLESS
