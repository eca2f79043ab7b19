"""The names of CLIP's text model in Transformers' checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from rflow_jax.weights.tables import Rule, Table

_LAYER = r"encoder.layers.\1"

TRANSFORMERS = Table(
    "CLIP text model",
    (
        Rule(r"embed", r"embeddings.token_embedding"),
        Rule(r"positions", r"embeddings.position_embedding"),
        Rule(r"blocks\.(\d+)\.attn_norm", _LAYER + r".layer_norm1"),
        Rule(r"blocks\.(\d+)\.attn\.([qkv])", _LAYER + r".self_attn.\2_proj"),
        Rule(r"blocks\.(\d+)\.attn\.out", _LAYER + r".self_attn.out_proj"),
        Rule(r"blocks\.(\d+)\.ff_norm", _LAYER + r".layer_norm2"),
        Rule(r"blocks\.(\d+)\.ff\.up", _LAYER + r".mlp.fc1"),
        Rule(r"blocks\.(\d+)\.ff\.down", _LAYER + r".mlp.fc2"),
        Rule(r"final_norm", r"final_layer_norm"),
    ),
    # 0, 1, 2 ... in old files; the projection to CLIP's image space, which FLUX does not use, in some.
    ignore=(r"(text_model\.)?embeddings\.position_ids", r"text_projection\.weight"),
    prefix="text_model.",
)

# Transformers 5 saves the text model without the prefix.
TRANSFORMERS_5 = replace(TRANSFORMERS, prefix="")


def table_for(keys: Iterable[str]) -> Table:
    """The table of a checkpoint, told by its keys."""
    return TRANSFORMERS_5 if any(key.startswith("embeddings.") for key in keys) else TRANSFORMERS
