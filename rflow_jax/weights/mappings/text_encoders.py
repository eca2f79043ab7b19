"""CLIP and T5, as Transformers writes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from rflow_jax.weights.key_mapping import LEAVES, KeyMapping, Rule

LOGIT_SCALE = "logit_scale"
_CLIP_LAYER = r"encoder.layers.\1"

_CLIP_LAYERS = (
    Rule(r"blocks\.(\d+)\.attn_norm", _CLIP_LAYER + r".layer_norm1"),
    Rule(r"blocks\.(\d+)\.attn\.([qkv])", _CLIP_LAYER + r".self_attn.\2_proj"),
    Rule(r"blocks\.(\d+)\.attn\.out", _CLIP_LAYER + r".self_attn.out_proj"),
    Rule(r"blocks\.(\d+)\.ff_norm", _CLIP_LAYER + r".layer_norm2"),
    Rule(r"blocks\.(\d+)\.ff\.up", _CLIP_LAYER + r".mlp.fc1"),
    Rule(r"blocks\.(\d+)\.ff\.down", _CLIP_LAYER + r".mlp.fc2"),
)

CLIP_TEXT = KeyMapping(
    "CLIP text model",
    (
        Rule(r"embed", r"embeddings.token_embedding"),
        Rule(r"positions", r"embeddings.position_embedding"),
        *_CLIP_LAYERS,
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
    *_CLIP_LAYERS,
    Rule(r"final_norm", r"post_layernorm"),
)


def _clip_part(rules: Iterable[Rule], part: str) -> tuple[Rule, ...]:
    """The rules of a model that is a part of the whole."""
    return tuple(Rule(rf"{part}\.{rule.flax}", rf"{part}_model.{rule.torch}", rule.via) for rule in rules)


CLIP_WHOLE = KeyMapping(
    "CLIP",
    (
        *_clip_part(CLIP_TEXT.rules, "text"),
        *_clip_part(_VISION, "vision"),
        Rule(r"vision", r"vision_model.embeddings"),  # the class's vector
        Rule(r"text_out", r"text_projection"),
        Rule(r"vision_out", r"visual_projection"),
    ),
    # The scale is not a parameter of ours: the loader reads it as float32.
    ignore=(r"(text|vision)_model\.embeddings\.position_ids", LOGIT_SCALE),
    leaves=LEAVES | {"class_embedding": "class_embedding"},
)

# Transformers 5 saves the text model without the prefix.
CLIP_TEXT_5 = replace(CLIP_TEXT, prefix="")


def clip_mapping(keys: Iterable[str]) -> KeyMapping:
    """The table of a checkpoint, detected by its keys."""
    return CLIP_TEXT_5 if any(key.startswith("embeddings.") for key in keys) else CLIP_TEXT


_BLOCK = r"blocks\.(\d+)\."
_ATTENTION = r"encoder.block.\1.layer.0.SelfAttention"
_FEED_FORWARD = r"encoder.block.\1.layer.1.DenseReluDense"

T5 = KeyMapping(
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
T5_UNSHARED = replace(T5, rules=(Rule(r"embed", r"encoder.embed_tokens"), *T5.rules[1:]), ignore=())


def t5_mapping(keys: Iterable[str]) -> KeyMapping:
    """The table of a checkpoint, detected by its keys."""
    names = set(keys)
    return T5_UNSHARED if "shared.weight" not in names and "encoder.embed_tokens.weight" in names else T5
