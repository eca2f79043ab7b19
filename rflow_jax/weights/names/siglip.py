"""The names of SigLIP's vision tower in Transformers' checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from rflow_jax.weights.tables import Rule, Table

_LAYER = r"encoder.layers.\1"

TRANSFORMERS = Table(
    "SigLIP vision tower",
    (
        Rule(r"patches", r"embeddings.patch_embedding"),
        Rule(r"positions", r"embeddings.position_embedding"),
        Rule(r"blocks\.(\d+)\.attn_norm", _LAYER + r".layer_norm1"),
        Rule(r"blocks\.(\d+)\.attn\.([qkv])", _LAYER + r".self_attn.\2_proj"),
        Rule(r"blocks\.(\d+)\.attn\.out", _LAYER + r".self_attn.out_proj"),
        Rule(r"blocks\.(\d+)\.ff_norm", _LAYER + r".layer_norm2"),
        Rule(r"blocks\.(\d+)\.up", _LAYER + r".mlp.fc1"),
        Rule(r"blocks\.(\d+)\.down", _LAYER + r".mlp.fc2"),
        Rule(r"final_norm", r"post_layernorm"),
    ),
    # 0, 1, 2 ... in old files; the pooling head of towers that have one.
    ignore=(r"(vision_model\.)?embeddings\.position_ids", r"(vision_model\.)?head\..*"),
    prefix="vision_model.",
)

# Transformers 5 may save the tower without the prefix.
TRANSFORMERS_5 = replace(TRANSFORMERS, prefix="")


def table_for(keys: Iterable[str]) -> Table:
    """The table of a checkpoint, told by its keys."""
    return TRANSFORMERS_5 if any(key.startswith("embeddings.") for key in keys) else TRANSFORMERS
