"""Options of all networks, such as the attention's implementation, and checks that their configurations share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from rflow_jax.errors import InputError

AttentionImpl = Literal["auto", "reference", "xla", "cudnn", "flash"]

# "none" keeps every intermediate result of a block for the backward pass; "dots" keeps the results of products and
# recomputes the rest; "dots_and_attention" also keeps what an attention kernel gives, so that only cheap operations are
# recomputed; "full" keeps only a block's inputs.
Remat = Literal["none", "dots", "dots_and_attention", "full"]

# The linears that the original trains: those of condition tokens, without the first linear of the double blocks'
# feed-forward.
CORRECTOR_TARGET_MODULES = (
    r"image_in"
    r"|double_blocks\.\d+\.image\.(mod|qkv\.[qkv]|out|ff\.down)"
    r"|single_blocks\.\d+\.(mod|qkv\.[qkv]|mlp|out)"
)


def require_kind(config: Mapping[str, Any], key: str, kind: str, source: str) -> None:
    """Raises InputError, which begins with ``source``, for a ``config.json`` that says another ``kind`` than this."""
    if (found := config.get(key, kind)) != kind:
        raise InputError(f"{source}: {key} {found!r} is not supported, only {kind!r}")


def require_heads(width: int, heads: int, source: str) -> None:
    """Raises InputError, which begins with ``source``, if a layer's width can't be divided into its heads."""
    if width % heads:
        raise InputError(f"{source}: num_attention_heads {heads} does not divide hidden_size {width}")
