"""Samples -> arrays of one fixed size, one row per sample, so that one program serves them and any device any row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from rflow_jax.data.loader import ItemRef, Loader, LoaderConfig, ShuffledSampler, WorkerResult
from rflow_jax.data.records import RecordError, first_held_out
from rflow_jax.errors import InputError
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from rflow_jax.models.qwen2_5_vl.layout import VisionLayout, image_places, layout_of, rope_positions, window_count
from rflow_jax.training.qwen.config import QwenDataConfig
from rflow_jax.typing import Array, Int, UInt8
from rflow_jax.vlm.qwen_batching import QwenInputs, QwenSample
from rflow_jax.vlm.qwen_processing import ImageProcessorConfig


class Rows(NamedTuple):
    """A batch; every array begins with the rows.

    Attributes:
        positions: multimodal rotary positions.
        places: for every token the index of the image token (of its row) that replaces it, or -1.
        patches: of each row's images, each padded; None: no images.
        layout: of these images, with arrays that begin with the rows.
    """

    ids: Int[Array | np.ndarray, "b t"]
    lengths: Int[Array | np.ndarray, " b"]
    positions: Int[Array | np.ndarray, "b 3 t"]
    places: Int[Array | np.ndarray, "b t"] | None
    patches: UInt8[Array | np.ndarray, "b i p f"] | None
    layout: Any


class RowSizes(NamedTuple):
    """The sizes that every row is padded to.

    Attributes:
        pictures: images of a row.
        patches, windows: of an image.
    """

    tokens: int
    pictures: int
    patches: int
    windows: int

    @classmethod
    def of(
        cls, data: QwenDataConfig, config: Qwen25VLConfig, rules: ImageProcessorConfig, *, pictures: int
    ) -> RowSizes:
        """Sizes for every image of at most ``max_pixels`` and of sides no more unequal than ``max_ratio``."""
        units = max(data.max_pixels, rules.min_pixels) // rules.factor**2 + 1
        side = config.vision.window_units
        windows = max(
            math.ceil(rows / side) * math.ceil(units // rows / side)
            for rows in range(1, math.isqrt(units) + 1)
            # Sides are rounded to whole units, so an image at the limit may be a unit longer.
            if units // rows <= data.max_ratio * rows + 1
        )
        tokens = min(data.max_tokens, config.language.max_position_embeddings)
        return cls(tokens, pictures, units * config.vision.unit, windows)

    def require(self, sample: QwenSample, config: Qwen25VLConfig, key: str) -> QwenSample:
        """The sample; raises RecordError if it does not fit."""
        if len(sample.ids) > self.tokens:
            raise RecordError(f"{key}: {len(sample.ids)} tokens, more than data.max_tokens ({self.tokens})")
        if len(sample.pictures) > self.pictures:
            raise RecordError(f"{key}: {len(sample.pictures)} pictures, more than data.max_images ({self.pictures})")
        for _, grid in sample.pictures:
            if grid[1] * grid[2] > self.patches or window_count(grid, config.vision) > self.windows:
                raise RecordError(f"{key}: a picture of {grid[1]} x {grid[2]} patches is beyond data.max_ratio")
        return sample


def rows_of(samples: Sequence[QwenSample], config: Qwen25VLConfig, *, pad: int, sizes: RowSizes) -> Rows:
    """Pads samples into rows.

    Args:
        pad: the padding token.
    """
    b, unit = len(samples), config.vision.unit
    ids = np.full((b, sizes.tokens), pad, np.int32)
    for row, sample in zip(ids, samples, strict=True):
        row[: len(sample.ids)] = sample.ids
    lengths = np.asarray([len(sample.ids) for sample in samples], np.int32)
    positions, _ = rope_positions(ids, lengths, [sample.grids for sample in samples], config)
    text = Rows(ids, lengths, positions.transpose(1, 0, 2), None, None, None)
    if not sizes.pictures:
        return text
    grids = [[*sample.grids, *[(0, 0, 0)] * (sizes.pictures - len(sample.grids))] for sample in samples]
    layout = layout_of(list(chain.from_iterable(grids)), config.vision, patches=sizes.patches, windows=sizes.windows)
    places: list[np.ndarray] = []
    values = config.vision.patch_values // config.vision.temporal_patch_size
    patches = np.zeros((b, sizes.pictures, sizes.patches, values), np.uint8)
    for k, sample in enumerate(samples):
        tokens = [grid[1] * grid[2] // unit for grid in sample.grids]
        row = slice(k, k + 1)
        places.append(image_places(ids[row], lengths[row], [tokens], config, padded=sizes.patches // unit))
        for slot, (own, _) in zip(patches[k], sample.pictures, strict=False):
            slot[: len(own)] = own
    return text._replace(
        places=np.concatenate(places),
        patches=patches,
        layout=VisionLayout(*(x.reshape(b, sizes.pictures, *x.shape[1:]) for x in layout)),
    )


def inputs_of(rows: Rows, unit: int) -> QwenInputs:
    """The batch as the network takes it, all images one after another; on the device.

    Args:
        unit: patches per token.
    """
    ids, lengths = jnp.asarray(rows.ids), jnp.asarray(rows.lengths)
    live, following = jnp.ones_like(lengths, dtype=bool), jnp.zeros_like(lengths)
    text = QwenInputs(ids, lengths, live, jnp.moveaxis(jnp.asarray(rows.positions), 1, 0), following, None, None, None)
    if rows.patches is None or rows.places is None:
        return text
    b, pictures = rows.patches.shape[:2]
    layout = VisionLayout(*(jnp.asarray(x).reshape(b * pictures, *x.shape[2:]) for x in rows.layout))
    patches = jnp.asarray(rows.patches).reshape(b * pictures, *rows.patches.shape[2:])
    of_a_row = pictures * patches.shape[1] // unit
    first = of_a_row * jnp.arange(b, dtype=jnp.int32)[:, None]
    places = jnp.where(jnp.asarray(rows.places) < 0, -1, rows.places + first)
    return text._replace(places=places, patches=patches, layout=layout)


@runtime_checkable
class SampleSource(Protocol):
    """Random access to records; can be pickled, to be read in worker processes.

    Attributes:
        fingerprint: of the records and their order.
    """

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Any:
        """Reads one record; raises RecordError if it cannot be used."""
        ...


@runtime_checkable
class Collator(Protocol):
    """Turns records into the inputs of the network; can be pickled too."""

    def example(self, record: Any, /) -> Any:
        """One prepared record; raises RecordError if it cannot be used."""
        ...

    def inputs(self, examples: Sequence[Any], count: int) -> Any:
        """Examples as arrays that begin with ``count`` rows; those beyond the examples have no influence."""
        ...

    def digest(self, record: Any, /) -> bytes:
        """A hash of everything in a record."""
        ...


class ArrayBatch(NamedTuple):
    """This process's samples of one step; attributes as in :class:`~rflow_jax.data.loader.HostBatch`."""

    step: int
    inputs: Any
    skipped: list[str]
    waited: float
    digest: str


@dataclass(frozen=True)
class MakeExample:
    """Reads and prepares the record of a job; runs in a worker."""

    source: SampleSource
    maker: Collator

    def __call__(self, job: ItemRef) -> WorkerResult:
        try:
            record = self.source.read(job.index)
            return WorkerResult(self.maker.example(record), self.maker.digest(record))
        except RecordError as error:
            return WorkerResult(None, b"", str(error))


class ArrayLoader(Loader):
    """Batches of arrays."""

    def __init__(self, plan: ShuffledSampler, source: SampleSource, maker: Collator, config: LoaderConfig, start: int):
        super().__init__(plan, MakeExample(source, maker), config, start)
        self._maker = maker

    def _batch(self, numbers: np.ndarray, examples: list[Any], common_fields: dict[str, Any]) -> Any:
        return ArrayBatch(inputs=self._maker.inputs(examples, len(examples)), **common_fields)


def open_array_loader(
    source: SampleSource,
    maker: Collator,
    config: LoaderConfig,
    *,
    start: int,
    position: Mapping[str, Any] | None,
    **options: Any,
) -> ArrayLoader:
    """Batches from a step on; ``options`` as in :class:`~rflow_jax.data.loader.ShuffledSampler`."""
    plan = ShuffledSampler(len(source), fingerprint=source.fingerprint, position=position, **options)
    return ArrayLoader(plan, source, maker, config, start)


def first_usable(source: SampleSource, maker: Collator, count: int) -> list[Any]:
    """The examples of the first usable records.

    Raises:
        InputError: there is none.
    """
    found, error = first_held_out(lambda index: maker.example(source.read(index)), len(source), count)
    if not found:
        raise InputError(f"validation: no record is usable; the last: {error}")
    return found
