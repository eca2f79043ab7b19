"""Opens training records of any format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rflow_jax.data.config import DataConfig
from rflow_jax.data.loader import Loader, RecordCollator, RecordSampler
from rflow_jax.data.records import RecordSource
from rflow_jax.data.sources.latents import open_latent_loader
from rflow_jax.data.sources.stream import open_stream
from rflow_jax.data.sources.tar import open_tars
from rflow_jax.errors import InputError


def open_source(config: DataConfig) -> RecordSource:
    """The records with random access.

    Raises:
        InputError: there are none, or the format has no random access.
    """
    if config.format == "tar":
        cache = Path(config.cache) if config.cache else None
        return open_tars(config.path, cache=cache, retry=config.retry)
    if config.format == "tfds":
        from rflow_jax.data.sources.tfds import open_tfds  # an optional extra

        return open_tfds(config.path)
    raise InputError(f"data.format is {config.format}: it has no random access; give tar or tfds")


def open_loader(
    config: DataConfig,
    *,
    seed: int,
    batch_size: int,
    slots: Sequence[int],
    start: int = 0,
    position: Mapping[str, Any] | None = None,
) -> Loader:
    """The batches from step ``start`` on.

    Args:
        batch_size: samples of a step, over all processes.
        slots: those of them that this process makes.
        position: of a resumed run, from :meth:`Loader.position`.

    Raises:
        InputError: the records are unusable, or not those of the position.
    """
    options = {"seed": seed, "batch_size": batch_size, "slots": slots, "position": position}
    if config.format == "precomputed":
        return open_latent_loader(config, **options, start=start)
    if config.format == "stream":
        return open_stream(config, **options, start=start)
    source = open_source(config)
    return Loader(RecordSampler(source, config, **options), RecordCollator(source, config, seed), config, start)
