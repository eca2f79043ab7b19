"""The T5 encoder's names in Transformers' checkpoints (4.x and 5.x have the same)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from rflow_jax.weights.tables import Rule, Table

_BLOCK = r"blocks\.(\d+)\."
_ATTENTION = r"encoder.block.\1.layer.0.SelfAttention"
_FEED_FORWARD = r"encoder.block.\1.layer.1.DenseReluDense"

TRANSFORMERS = Table(
    "T5 encoder",
    (
        Rule(r"embed", r"shared"),
        # Stored in the first block, used by all.
        Rule(r"position_bias", r"encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
        Rule(_BLOCK + r"attn_norm", r"encoder.block.\1.layer.0.layer_norm"),
        Rule(_BLOCK + r"attn\.([qkv])", _ATTENTION + r".\2"),
        Rule(_BLOCK + r"attn\.out", _ATTENTION + r".o"),
        Rule(_BLOCK + r"ff_norm", r"encoder.block.\1.layer.1.layer_norm"),
        Rule(_BLOCK + r"ff\.gate", _FEED_FORWARD + r".wi_0"),
        Rule(_BLOCK + r"ff\.up", _FEED_FORWARD + r".wi_1"),
        Rule(_BLOCK + r"ff\.down", _FEED_FORWARD + r".wo"),
        Rule(r"final_norm", r"encoder.final_layer_norm"),
    ),
    ignore=(r"encoder\.embed_tokens\.weight",),  # the same tensor as shared.weight
)

# Some files hold the tied embedding under its other name only.
UNSHARED = replace(TRANSFORMERS, rules=(Rule(r"embed", r"encoder.embed_tokens"), *TRANSFORMERS.rules[1:]), ignore=())


def table_for(keys: Iterable[str]) -> Table:
    """The table of a checkpoint, told by its keys."""
    names = set(keys)
    return UNSHARED if "shared.weight" not in names and "encoder.embed_tokens.weight" in names else TRANSFORMERS
