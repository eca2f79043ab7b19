"""The names of SigLIP's vision tower in Transformers' checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from rflow_jax.weights.key_mapping import KeyMapping, Rule

_LAYER = r"encoder.layers.\1"

SIGLIP = KeyMapping(
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
SIGLIP_5 = replace(SIGLIP, prefix="")


def siglip_mapping(keys: Iterable[str]) -> KeyMapping:
    """The table of a checkpoint, detected by its keys."""
    return SIGLIP_5 if any(key.startswith("embeddings.") for key in keys) else SIGLIP


PROJECTOR = KeyMapping(
    "NVILA projector",
    (
        Rule(r"norm_in", "layers.1"),
        Rule(r"reduce", "layers.2"),
        Rule(r"norm", "layers.4"),
        Rule(r"project", "layers.5"),
        Rule(r"out", "layers.7"),
    ),
)
