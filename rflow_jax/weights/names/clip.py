"""The names of CLIP in Transformers' checkpoints: the text model alone, and the whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from rflow_jax.weights.tables import LEAVES, Rule, Table

LOGIT_SCALE = "logit_scale"
_LAYER = r"encoder.layers.\1"

_LAYERS = (
    Rule(r"blocks\.(\d+)\.attn_norm", _LAYER + r".layer_norm1"),
    Rule(r"blocks\.(\d+)\.attn\.([qkv])", _LAYER + r".self_attn.\2_proj"),
    Rule(r"blocks\.(\d+)\.attn\.out", _LAYER + r".self_attn.out_proj"),
    Rule(r"blocks\.(\d+)\.ff_norm", _LAYER + r".layer_norm2"),
    Rule(r"blocks\.(\d+)\.ff\.up", _LAYER + r".mlp.fc1"),
    Rule(r"blocks\.(\d+)\.ff\.down", _LAYER + r".mlp.fc2"),
)

TRANSFORMERS = Table(
    "CLIP text model",
    (
        Rule(r"embed", r"embeddings.token_embedding"),
        Rule(r"positions", r"embeddings.position_embedding"),
        *_LAYERS,
        Rule(r"final_norm", r"final_layer_norm"),
    ),
    # 0, 1, 2 ... in old files; the projection to CLIP's image space, which FLUX does not use, in some.
    ignore=(r"(text_model\.)?embeddings\.position_ids", r"text_projection\.weight"),
    prefix="text_model.",
)

_VISION = (
    Rule(r"patches", r"embeddings.patch_embedding"),
    Rule(r"positions", r"embeddings.position_embedding"),
    Rule(r"first_norm", r"pre_layrnorm"),  # misspelt in every checkpoint
    *_LAYERS,
    Rule(r"final_norm", r"post_layernorm"),
)


def _part(rules: Iterable[Rule], part: str) -> tuple[Rule, ...]:
    """The rules of a model that is a part of the whole."""
    return tuple(Rule(rf"{part}\.{rule.ours}", rf"{part}_model.{rule.theirs}", rule.via) for rule in rules)


WHOLE = Table(
    "CLIP",
    (
        *_part(TRANSFORMERS.rules, "text"),
        *_part(_VISION, "vision"),
        Rule(r"vision", r"vision_model.embeddings"),  # the class's vector
        Rule(r"text_out", r"text_projection"),
        Rule(r"vision_out", r"visual_projection"),
    ),
    # The scale is no parameter of ours: its loader takes it as float32.
    ignore=(r"(text|vision)_model\.embeddings\.position_ids", LOGIT_SCALE),
    leaves=LEAVES | {"class_embedding": "class_embedding"},
)

# Transformers 5 saves the text model without the prefix.
TRANSFORMERS_5 = replace(TRANSFORMERS, prefix="")


def table_for(keys: Iterable[str]) -> Table:
    """The table of a checkpoint, told by its keys."""
    return TRANSFORMERS_5 if any(key.startswith("embeddings.") for key in keys) else TRANSFORMERS
