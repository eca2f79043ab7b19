"""Configuration of the training data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rflow_jax.data.sampling import SubsetSchedule
from rflow_jax.data.storage.retry import RetryPolicy
from rflow_jax.errors import InputError
from rflow_jax.utils.ranges import Buffer, CountOrZero, NotNegative, Share, Side, SmallCount, Workers, require_ranges

Format = Literal["tar", "stream", "tfds", "precomputed"]


@dataclass(frozen=True)
class DataConfig:
    """GenRef: where it is stored, what is drawn, and how a record is processed.

    Attributes:
        path: tar files: paths, folders, hf://, http(s)://, gs:// or s3:// addresses, with {000..208} and *; or the
            folder of a TFDS data set or of precomputed latents.
        format: ``tar`` reads records by byte range, after one pass for an index; ``stream`` reads each shard once, in
            order, for what has no byte ranges; ``tfds`` and ``precomputed`` are folders made by
            ``rflow data``.
        split_ratios: for each subset its weight at each stage; a subset that is left out is never drawn.
        training_stages: the optimizer steps of these stages; between two the weights are interpolated.
        target_size: pixels of the square that training images are cut to.
        condition_size: pixels of the bad image's square.
        crop: ``random``, or ``center``: the same for a record each time, as precomputed latents need it.
        drop_text_prob: how often T5 gets no text.
        drop_image_prob: how often the condition is black and the reflection goes (never of editing).
        drop_reflection_prob: how often T5 gets the prompt without the reflection.
        workers: processes that read and decode; null: one a core but one. 0 works in the run's own process. A stream
            is read by the run itself and decoded by them; ``precomputed`` needs none.
        prefetch: batches made in advance.
        skip_limit: more unusable records than this, of one process and since it was started, end the run.
        cache: folder of the shards' indexes; null: ~/.cache/rflow_jax/genref.
        allow_shell: whether ``pipe:`` shards may run shell commands.
        shuffle_buffer_size: records of each subset held in memory to be shuffled, in every process (``stream`` alone);
            of GenRef about 1.6 MB each; fewer of records above 2 MiB.
        retry: timeouts and retries of servers.
    """

    path: str | list[str]
    format: Format = "tar"
    split_ratios: dict[str, list[NotNegative]] = field(
        default_factory=lambda: {
            "general": [0.1, 0.3],
            "length": [0.1, 0.3],
            "rule": [0.1, 0.4],
            "editing": [0.7, 0.0],
        }
    )
    training_stages: list[CountOrZero] = field(default_factory=lambda: [0, 5000])
    target_size: Side = 1024
    condition_size: Side = 512
    crop: Literal["random", "center"] = "random"
    drop_text_prob: Share = 0.1
    drop_image_prob: Share = 0.1
    drop_reflection_prob: Share = 0.1
    workers: Workers | None = None
    prefetch: SmallCount = 4
    skip_limit: CountOrZero = 1000
    cache: str | None = None
    allow_shell: bool = False
    shuffle_buffer_size: Buffer = 1000
    retry: RetryPolicy = RetryPolicy()

    def __post_init__(self) -> None:
        SubsetSchedule(self.split_ratios, self.training_stages, seed=0, batch_size=1)  # validates both
        require_ranges(self, "data")

    def require_grid(self, token_pixels: int) -> None:
        """Raises InputError unless the sizes are whole numbers of the model's tokens."""
        for name in ("target_size", "condition_size"):
            if getattr(self, name) % token_pixels:
                raise InputError(f"data.{name} is {getattr(self, name)}: give a multiple of {token_pixels}")
