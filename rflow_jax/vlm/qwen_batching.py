"""Batches of Qwen2.5-VL's inputs, padded to few sizes (few programs are compiled) that are close (little is wasted)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from rflow_jax.models.qwen2_5_vl.layout import Grid, VisionLayout, image_places, layout_of, rope_positions, window_count
from rflow_jax.typing import Array, Bool, Int, UInt8

STEPS = 16  # of each doubling


def bucket(size: int, least: int = 1) -> int:
    """The smallest padded size for ``size``: at most 1/16 larger, or ``least``."""
    if size <= least:
        return least
    step = max(1, 2 ** ((size - 1).bit_length() - 1) // STEPS)
    return -(-size // step) * step


LEAST_TOKENS, LEAST_PATCHES = 64, 64


@dataclass(frozen=True)
class QwenSample:
    """One chat.

    Attributes:
        ids: [t] tokens, with pictures' tokens expanded.
        pictures: patches [p, f] (bytes, see :func:`rflow_jax.vlm.qwen_processing.patches_of`) and grid of each.
    """

    ids: np.ndarray
    pictures: tuple[tuple[np.ndarray, Grid], ...] = field(default=())

    @property
    def grids(self) -> list[Grid]:
        return [grid for _, grid in self.pictures]


class QwenInputs(NamedTuple):
    """A batch as it leaves the host; rows without a sample contain one token of padding.

    Attributes:
        positions: multimodal rotary positions.
        next_position: of the first token after each sample.
        places: for every token the row of the pictures' tokens that replaces it, or -1.
        patches: of all pictures of the batch, each padded; None: no pictures.
    """

    ids: Int[Array | np.ndarray, "b t"]
    lengths: Int[Array | np.ndarray, " b"]
    live: Bool[Array | np.ndarray, " b"]
    positions: Int[Array | np.ndarray, "3 b t"]
    next_position: Int[Array | np.ndarray, " b"]
    places: Int[Array | np.ndarray, "b t"] | None
    patches: UInt8[Array | np.ndarray, "i p f"] | None
    layout: VisionLayout | None


class Sizes(NamedTuple):
    """Padded sizes of a batch.

    Attributes:
        rows: samples.
        tokens: of each sample.
        pictures: in the whole batch; 0: text only.
        patches, windows: of each picture.
    """

    rows: int
    tokens: int
    pictures: int = 0
    patches: int = 0
    windows: int = 0

    @classmethod
    def exact(cls, samples: Sequence[QwenSample], config: Qwen25VLConfig) -> Sizes:
        """The sizes of the largest sample and picture."""
        pictures = [picture for sample in samples for picture in sample.pictures]
        return cls(
            len(samples),
            max(len(sample.ids) for sample in samples),
            len(pictures),
            max((len(patches) for patches, _ in pictures), default=0),
            max((window_count(grid, config.vision) for _, grid in pictures), default=0),
        )

    @classmethod
    def bucketed(cls, samples: Sequence[QwenSample], config: Qwen25VLConfig, rows: int) -> Sizes:
        """Sizes rounded up to one of few values, so that few programs are compiled."""
        _, tokens, pictures, patches, windows = cls.exact(samples, config)
        tokens = bucket(tokens, LEAST_TOKENS)
        if not pictures:
            return cls(rows, tokens)
        unit = config.vision.unit
        patches = -(-bucket(patches, LEAST_PATCHES) // unit) * unit
        # The same number of pictures in every batch, also in the last: a multiple of the rows.
        return cls(rows, tokens, -(-pictures // rows) * rows, patches, bucket(windows))


def batch_of(samples: Sequence[QwenSample], config: Qwen25VLConfig, *, pad: int, sizes: Sizes) -> QwenInputs:
    """Pads samples into one batch.

    Args:
        pad: the token of padding.

    Raises:
        InputError: a sample's tokens do not match its pictures, or a picture is not made of whole units.
    """
    ids = np.full((sizes.rows, sizes.tokens), pad, np.int32)
    lengths = np.ones(sizes.rows, np.int32)
    for k, sample in enumerate(samples):
        ids[k, : len(sample.ids)] = sample.ids
        lengths[k] = len(sample.ids)
    grids = [sample.grids for sample in samples] + [[] for _ in range(sizes.rows - len(samples))]
    positions, following = rope_positions(ids, lengths, grids, config)
    live = np.arange(sizes.rows) < len(samples)
    text = QwenInputs(ids, lengths, live, positions, following, None, None, None)
    if not sizes.pictures:
        return text
    pictures = [picture for sample in samples for picture in sample.pictures]
    everywhere = [grid for _, grid in pictures] + [(0, 0, 0)] * (sizes.pictures - len(pictures))
    tokens = [[grid[1] * grid[2] // config.vision.unit for grid in own] for own in grids]
    # One frame of every patch.
    values = config.vision.patch_values // config.vision.temporal_patch_size
    frames = np.zeros((sizes.pictures, sizes.patches, values), np.uint8)
    for row, (patches, _) in zip(frames, pictures, strict=False):
        row[: len(patches)] = patches
    return text._replace(
        places=image_places(ids, lengths, tokens, config, padded=sizes.patches // config.vision.unit),
        patches=frames,
        layout=layout_of(everywhere, config.vision, patches=sizes.patches, windows=sizes.windows),
    )
