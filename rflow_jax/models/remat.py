"""What the backward pass of training computes again to save memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax

# "none" keeps every intermediate result of a block for the backward pass; "dots" the results of products, and computes
# the rest again; "full" keeps a block's inputs alone.
Remat = Literal["none", "dots", "full"]
_SAVED = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


def remember(block: Callable[..., Any], remat: Remat, *, in_scan: bool = False) -> Callable[..., Any]:
    """A block that keeps for its backward pass only what ``remat`` says.

    Args:
        in_scan: it is the body of a loop, where the compiler needs no barriers to keep it from undoing this.
    """
    return block if remat == "none" else jax.checkpoint(block, policy=_SAVED[remat], prevent_cse=not in_scan)
