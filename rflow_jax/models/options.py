"""Options of all networks: the attention's implementation, and rematerialisation for the backward pass."""

from __future__ import annotations

from typing import Literal

AttentionImpl = Literal["auto", "reference", "xla", "cudnn", "flash"]

# "none" keeps every intermediate result of a block for the backward pass; "dots" keeps the results of products and
# recomputes the rest; "full" keeps only a block's inputs.
Remat = Literal["none", "dots", "full"]

# The linears that the original trains: those of condition tokens, without the first linear of the double blocks'
# feed-forward.
CORRECTOR_TARGET_MODULES = (
    r"image_in"
    r"|double_blocks\.\d+\.image\.(mod|qkv\.[qkv]|out|ff\.down)"
    r"|single_blocks\.\d+\.(mod|qkv\.[qkv]|mlp|out)"
)
