"""Qwen2 and Qwen2.5-VL, as Transformers writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rflow_jax.weights.key_mapping import KeyMapping, Rule

_LAYER = r"layers.\1"
HEAD = "lm_head"


def qwen2_rules(ours: str, theirs: str) -> tuple[Rule, ...]:
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
_CONSTANT = r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
QWEN2 = KeyMapping("Qwen2", (*qwen2_rules("", "model."), Rule(r"head", HEAD)), ignore=(r"model\." + _CONSTANT,))
QWEN2_HEADLESS = KeyMapping("Qwen2", qwen2_rules("", "model."), ignore=(r"model\." + _CONSTANT, rf"{HEAD}\.weight"))


def qwen2_mapping(*, head: bool) -> KeyMapping:
    """The table of a decoder with its own head, or with its embedding as the head (or without one)."""
    return QWEN2 if head else QWEN2_HEADLESS


NAME = "Qwen2.5-VL"
# (before the language model's keys, before the vision tower's): published, and Transformers 5.
PLAIN, NESTED = ("model.", "visual."), ("model.language_model.", "model.visual.")


def _vision(theirs: str) -> tuple[Rule, ...]:
    block = theirs + r"blocks.\1"
    return (
        Rule(r"vision\.patch_in", theirs + r"patch_embed.proj"),
        Rule(r"vision\.blocks\.(\d+)\.attn_norm", block + r".norm1"),
        Rule(r"vision\.blocks\.(\d+)\.attn\.q", block + r".attn.qkv"),
        Rule(r"vision\.blocks\.(\d+)\.attn\.k", block + r".attn.qkv"),
        Rule(r"vision\.blocks\.(\d+)\.attn\.v", block + r".attn.qkv"),
        Rule(r"vision\.blocks\.(\d+)\.attn\.out", block + r".attn.proj"),
        Rule(r"vision\.blocks\.(\d+)\.ff_norm", block + r".norm2"),
        Rule(r"vision\.blocks\.(\d+)\.ff\.(gate|up|down)", block + r".mlp.\2_proj"),
        Rule(r"vision\.merger\.norm", theirs + r"merger.ln_q"),
        Rule(r"vision\.merger\.up", theirs + r"merger.mlp.0"),
        Rule(r"vision\.merger\.down", theirs + r"merger.mlp.2"),
    )


def qwen2_5_vl_mapping(keys: Iterable[str], *, head: bool) -> KeyMapping:
    """The table of a checkpoint, detected by its keys.

    Args:
        head: whether the network has a head of its own; otherwise a file's head is ignored.
    """
    language, vision = NESTED if any(key.startswith(NESTED[0]) for key in keys) else PLAIN
    constant = re.escape(language) + _CONSTANT
    rules = (*_vision(vision), *qwen2_rules("language.", language))
    if head:
        return KeyMapping(NAME, (*rules, Rule(r"language\.head", HEAD)), ignore=(constant,))
    return KeyMapping(NAME, rules, ignore=(constant, rf"{HEAD}\.weight"))


def reward_mapping() -> KeyMapping:
    """The names of the original's reward model without PEFT's wrapping, language head and LoRA."""
    rules = (*_vision(PLAIN[1]), *qwen2_rules("language.", PLAIN[0]), Rule(r"reward", "rm_head"))
    ignored = (r"model\." + _CONSTANT, rf"{HEAD}\.weight", r".*\.lora_[AB]\.weight")
    return KeyMapping("reward model", rules, ignore=ignored)
