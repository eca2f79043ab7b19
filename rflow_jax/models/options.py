"""What every network is told beside its inputs: which attention, what is computed again for the backward pass."""

from __future__ import annotations

from typing import Literal

AttentionImpl = Literal["auto", "reference", "xla", "cudnn", "flash"]


# "none" keeps every intermediate result of a block for the backward pass; "dots" the results of products, and computes
# the rest again; "full" keeps a block's inputs alone.
Remat = Literal["none", "dots", "full"]


# The linears that the original trains: those the condition's tokens pass through, without the first linear of
# the double blocks' feed-forward and without what only text passes through.
CORRECTOR_TARGET_MODULES = (
    r"image_in"
    r"|double_blocks\.\d+\.image\.(mod|qkv\.[qkv]|out|ff\.down)"
    r"|single_blocks\.\d+\.(mod|qkv\.[qkv]|mlp|out)"
)
