"""Sizes that arrays are padded to: few, so that few programs are compiled, and close, so that little is wasted."""

from __future__ import annotations

STEPS = 16  # of each doubling


def bucket(size: int, least: int = 1) -> int:
    """The smallest padded size for ``size``: at most 1/16 larger, or ``least``."""
    if size <= least:
        return least
    step = max(1, 2 ** ((size - 1).bit_length() - 1) // STEPS)
    return -(-size // step) * step
