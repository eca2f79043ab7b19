"""Chats with pictures -> one padded batch of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from rflow_jax.models.qwen2_5_vl.layout import Grid, VisionLayout, layout_of, window_count
from rflow_jax.models.qwen2_5_vl.positions import image_places, rope_positions
from rflow_jax.typing import Array, Bool, Int, UInt8
from rflow_jax.vlm.buckets import bucket

LEAST_TOKENS, LEAST_PATCHES, LEAST_WINDOWS = 64, 64, 1


@dataclass(frozen=True)
class Sample:
    """One chat.

    Attributes:
        ids: [t] tokens, pictures' tokens expanded.
        pictures: patches [p, f] (bytes, see :func:`rflow_jax.vlm.qwen_images.patches_of`) and grid of each.
    """

    ids: np.ndarray
    pictures: tuple[tuple[np.ndarray, Grid], ...] = field(default=())

    @property
    def grids(self) -> list[Grid]:
        return [grid for _, grid in self.pictures]


class Inputs(NamedTuple):
    """A batch as it leaves the host; rows without a sample are filled with one token of padding.

    Attributes:
        positions: multimodal rotary positions.
        next_position: of the first token after each sample.
        patches: of all pictures of the batch, each padded; None: no pictures. ``places`` says where they belong.
    """

    ids: Int[Array | np.ndarray, "b t"]
    lengths: Int[Array | np.ndarray, " b"]
    live: Bool[Array | np.ndarray, " b"]
    positions: Int[Array | np.ndarray, "3 b t"]
    next_position: Int[Array | np.ndarray, " b"]
    places: Int[Array | np.ndarray, "b t"] | None
    patches: UInt8[Array | np.ndarray, "i p f"] | None
    layout: VisionLayout | None


def batch_of(samples: Sequence[Sample], config: Qwen25VLConfig, *, pad: int, rows: int, exact: bool = False) -> Inputs:
    """Pads samples into one batch.

    Args:
        pad: the token of padding.
        rows: of the batch; those without a sample are filled.
        exact: pad no further than to the longest (for comparisons); else to one of few sizes.

    Raises:
        InputError: a sample's tokens are not those of its pictures, or no multiple of whole units.
    """
    size = (lambda n, least: max(n, 1)) if exact else bucket
    ids = np.full((rows, size(max(len(sample.ids) for sample in samples), LEAST_TOKENS)), pad, np.int32)
    lengths = np.ones(rows, np.int32)
    for k, sample in enumerate(samples):
        ids[k, : len(sample.ids)] = sample.ids
        lengths[k] = len(sample.ids)
    grids = [sample.grids for sample in samples] + [[] for _ in range(rows - len(samples))]
    positions, following = rope_positions(ids, lengths, grids, config)
    live = np.arange(rows) < len(samples)
    pictures = [picture for sample in samples for picture in sample.pictures]
    if not pictures:
        return Inputs(ids, lengths, live, positions, following, None, None, None)
    count = size(max(len(patches) for patches, _ in pictures), LEAST_PATCHES)
    count = -(-count // config.vision.unit) * config.vision.unit
    windows = size(max(window_count(grid, config.vision) for _, grid in pictures), LEAST_WINDOWS)
    # As many pictures in every batch, also in the last: a multiple of the rows.
    held = len(pictures) if exact else -(-len(pictures) // rows) * rows
    everywhere = [grid for _, grid in pictures] + [(0, 0, 0)] * (held - len(pictures))
    tokens = [[grid[1] * grid[2] // config.vision.unit for grid in own] for own in grids]
    return Inputs(
        ids,
        lengths,
        live,
        positions,
        following,
        image_places(ids, lengths, tokens, config, padded=count // config.vision.unit),
        _stacked([patches for patches, _ in pictures], held, count),
        layout_of(everywhere, config.vision, patches=count, windows=windows),
    )


def _stacked(patches: Sequence[np.ndarray], held: int, count: int) -> np.ndarray:
    out = np.zeros((held, count, patches[0].shape[-1]), np.uint8)
    for place, one in zip(out, patches, strict=False):
        place[: len(one)] = one
    return out


def check_context(sample: Sample, limit: int) -> None:
    """Raises InputError where a sample is longer than the model's context."""
    if len(sample.ids) > limit:
        raise InputError(f"the prompt takes {len(sample.ids)} tokens with its pictures, the context holds {limit}")
