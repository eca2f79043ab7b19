"""Qwen2.5-VL's names in Transformers' checkpoints: published files, and those that later versions save."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rflow_jax.weights.names import qwen2
from rflow_jax.weights.tables import Rule, Table

NAME = "Qwen2.5-VL"
# (before the language model's keys, before the vision tower's): published, and Transformers 5.
PLAIN, NESTED = ("model.", "visual."), ("model.language_model.", "model.visual.")

_UNUSED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight")


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


def table_for(keys: Iterable[str], *, head: bool) -> Table:
    """The table of a checkpoint, told by its keys.

    Args:
        head: whether the network has a head of its own; a file's head is left out where it has none.
    """
    language, vision = NESTED if any(key.startswith(NESTED[0]) for key in keys) else PLAIN
    constant = re.escape(language) + r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    rules = (*_vision(vision), *qwen2.rules("language.", language))
    if head:
        return Table(NAME, (*rules, Rule(r"language\.head", qwen2.HEAD)), ignore=(constant,))
    return Table(NAME, rules, ignore=(constant, rf"{qwen2.HEAD}\.weight"))


def reward_table() -> Table:
    """The names of the original's reward model, PEFT's wrapping taken off; its language head and LoRA are left out."""
    rules = (*_vision(PLAIN[1]), *qwen2.rules("language.", PLAIN[0]), Rule(r"reward", "rm_head"))
    return Table("reward model", rules, ignore=(*_UNUSED, r".*\.lora_[AB]\.weight"))
