"""CLIP and T5, as Transformers writes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from rflow_jax.errors import InputError
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
    # 0, 1, 2 ... in old files; in some, the rest of the whole CLIP, which FLUX does not use.
    ignore=(
        r"(text_model\.)?embeddings\.position_ids",
        r"(text_projection|visual_projection)\.weight",
        LOGIT_SCALE,
        r"vision_model\..*",
    ),
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


# As llama.cpp names them in GGUF files.
T5_GGUF = KeyMapping(
    "T5 encoder (GGUF)",
    (
        Rule(r"embed", r"token_embd"),
        Rule(r"position_bias", r"enc.blk.0.attn_rel_b"),
        Rule(_BLOCK + r"attn_norm", r"enc.blk.\1.attn_norm"),
        Rule(_BLOCK + r"attn\.([qkv])", r"enc.blk.\1.attn_\2"),
        Rule(_BLOCK + r"attn\.out", r"enc.blk.\1.attn_o"),
        Rule(_BLOCK + r"ff_norm", r"enc.blk.\1.ffn_norm"),
        Rule(_BLOCK + r"ff\.(gate|up|down)", r"enc.blk.\1.ffn_\2"),
        Rule(r"final_norm", r"enc.output_norm"),
    ),
)


def t5_mapping(keys: Iterable[str]) -> KeyMapping:
    """The table of a checkpoint, detected by its keys."""
    names = set(keys)
    if "token_embd.weight" in names:
        return T5_GGUF
    return T5_UNSHARED if "shared.weight" not in names and "encoder.embed_tokens.weight" in names else T5


Shapes = Mapping[str, tuple[int, ...]]
_CLIP_HEAD = 64  # numbers of a head, in every published CLIP; weights do not tell


def clip_sizes(shapes: Shapes, source: str) -> dict[str, int]:
    """What ``config.json`` says of a CLIP text model's sizes, from its tensors; raises InputError for another width."""
    table = clip_mapping(shapes)
    (vocabulary, width), (positions, _) = (_shape(table, shapes, name, source) for name in ("embed", "positions"))
    if width % _CLIP_HEAD:
        raise InputError(
            f"{source}: a CLIP of width {width}, whose number of heads is not known; "
            "name a folder with its text_encoder/config.json too"
        )
    return {
        "hidden_size": width,
        "intermediate_size": _shape(table, shapes, "blocks.0.ff.up", source)[0],
        "max_position_embeddings": positions,
        "num_attention_heads": width // _CLIP_HEAD,
        "num_hidden_layers": _blocks(table, shapes, "blocks.{}.ff.up"),
        "vocab_size": vocabulary,
    }


def t5_sizes(shapes: Shapes, source: str) -> dict[str, int]:
    """What ``config.json`` says of a T5 v1.1 encoder's sizes, from its tensors; raises InputError if one is missing."""
    table = t5_mapping(shapes)
    (vocabulary, width), (buckets, heads) = (_shape(table, shapes, name, source) for name in ("embed", "position_bias"))
    return {
        "d_ff": _shape(table, shapes, "blocks.0.ff.gate", source)[0],
        "d_kv": _shape(table, shapes, "blocks.0.attn.q", source)[0] // heads,
        "d_model": width,
        "num_heads": heads,
        "num_layers": _blocks(table, shapes, "blocks.{}.attn.q"),
        "relative_attention_num_buckets": buckets,
        "vocab_size": vocabulary,
    }


def is_clip_text(shapes: Shapes) -> bool:
    """Whether these are the tensors of a CLIP's text model, alone or in a whole CLIP."""
    return _key(clip_mapping(shapes), "embed") in shapes


def is_t5(shapes: Shapes) -> bool:
    """Whether these are the tensors of a T5's encoder."""
    return _key(t5_mapping(shapes), "blocks.0.attn.q") in shapes


def _key(table: KeyMapping, module: str) -> str:
    return f"{table.prefix}{table.module(module)[1]}.weight"


def _shape(table: KeyMapping, shapes: Shapes, module: str, source: str) -> tuple[int, ...]:
    """Rows and columns of a matrix."""
    key = _key(table, module)
    if len(shapes.get(key, ())) != 2 or not all(shapes[key]):
        raise InputError(f"{source}: has no matrix {key}; is it a {table.name}?")
    return shapes[key]


def _blocks(table: KeyMapping, shapes: Shapes, module: str) -> int:
    return next(k for k in range(len(shapes) + 1) if _key(table, module.format(k)) not in shapes)
