"""``rflow data tfds``, ``precompute`` and ``chats``: GenRef in other forms."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rflow_jax.data.config import DataConfig
from rflow_jax.data.records import Record, RecordError
from rflow_jax.data.sources.chats import PICTURE, chat_line
from rflow_jax.data.sources.latents import PrecomputeConfig
from rflow_jax.data.sources.open import open_source
from rflow_jax.data.storage.retry import RetryPolicy
from rflow_jax.errors import InputError
from rflow_jax.utils.atomic_io import write_file
from rflow_jax.utils.cli import Command
from rflow_jax.utils.output_folder import Claim, usable_folder
from rflow_jax.utils.ranges import Count, CountOrZero, require_ranges

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TfdsConfig:
    """A data set of TFDS from tar shards.

    Attributes:
        shards: tar files, as for training.
        out: folder; the data set goes to genref/1.0.0 in it.
        cache: folder of the shards' indexes; null: ~/.cache/rflow_jax/genref.
        retry: how long a server is waited for.
    """

    shards: str | list[str]
    out: str
    cache: str | None = None
    retry: RetryPolicy = field(default_factory=RetryPolicy)


@dataclass(frozen=True)
class ChatsConfig:
    """Chats: each bad picture with its prompt as a question, and its reflection as the answer.

    Attributes:
        shards: of GenRef: addresses as in the corrector's ``data``.
        out: folder of ``chats.jsonl``, ``held_out.jsonl`` and the pictures.
        question: the user's message; ``$prompt`` is the record's, and <image> the bad picture.
        held_out: number of records that go into ``held_out.jsonl``, spread evenly over all.
        limit: number of records, the first ones; null: all.
    """

    shards: str | list[str]
    out: str
    question: str = f"{PICTURE}Prompt: $prompt\nWhat should change in this picture?"
    held_out: CountOrZero = 8
    limit: Count | None = None

    def __post_init__(self) -> None:
        require_ranges(self)
        if self.question.count(PICTURE) != 1:
            raise InputError(f"question: must contain {PICTURE} once")


def command(name: str, argv: Sequence[str]) -> Command:
    """The command of this name."""
    if name == "data tfds":
        return Command((TfdsConfig,), tfds, ("shards", "out"))
    if name == "data chats":
        return Command((ChatsConfig,), chats, ("shards", "out"))
    return Command((PrecomputeConfig,), precompute, ("out",))


def tfds(config: TfdsConfig) -> None:
    """Tar shards -> ArrayRecord."""
    from rflow_jax.data.sources.tar import open_tars
    from rflow_jax.data.sources.tfds import import_tfds

    import_tfds()  # said before shards are indexed, and not after
    from rflow_jax.precompute.tfds_builder import write_tfds

    source = open_tars(config.shards, cache=Path(config.cache) if config.cache else None, retry=config.retry)
    out = Path(config.out)
    with usable_folder(out), Claim(out):
        folder = write_tfds(source, out)
    counts = ", ".join(f"{name} {count}" for name, count in source.counts.items())
    print(f"{folder}: {sum(source.counts.values())} records ({counts})")


def precompute(config: PrecomputeConfig) -> None:
    """Tar shards or a data set of TFDS -> latents and embeddings."""
    from rflow_jax.parallel.runtime import use_compilation_cache
    from rflow_jax.precompute.precompute import precompute as run

    use_compilation_cache()
    counts = run(config)
    print(f"{config.out}: {sum(counts.values())} records")


def chats(config: ChatsConfig) -> None:
    """GenRef's reflections -> chats."""
    out = Path(config.out)
    with usable_folder(out), Claim(out):
        learned, held_out = make_chats(config)
    print(f"{learned} chats, and {held_out} held out, in {config.out}")


def make_chats(config: ChatsConfig) -> tuple[int, int]:
    """Writes the two files and the pictures; returns how many chats are in each file.

    Raises:
        InputError: no record has a reflection.
    """
    out = Path(config.out)
    lines: list[str] = []
    for number, record in enumerate(_records(config)):
        name = f"pictures/{number:07d}.jpg"  # keys may stand in several shards
        write_file(out / name, record.bad_image)
        question = config.question.replace("$prompt", record.prompt)
        lines.append(chat_line([(question, record.reflection.strip())], name))
    if len(lines) <= config.held_out:
        raise InputError(f"{config.shards}: {len(lines)} records have a reflection, and {config.held_out} are held out")
    held_out = {(2 * k + 1) * len(lines) // (2 * config.held_out) for k in range(config.held_out)}
    write_file(out / "chats.jsonl", "".join(line for k, line in enumerate(lines) if k not in held_out))
    write_file(out / "held_out.jsonl", "".join(lines[k] for k in sorted(held_out)))
    return len(lines) - config.held_out, config.held_out


def _records(config: ChatsConfig) -> Any:
    source, count = open_source(DataConfig(config.shards)), 0
    for subset, records in source.counts.items():
        for index in range(records):
            if count == config.limit:
                return
            try:
                record: Record = source.read(subset, index)
            except RecordError as error:
                log.warning("left out: %s", error)
                continue
            # The marker of a picture in a text would stand for a picture that is not there.
            if record.reflection.strip() and PICTURE not in record.prompt + record.reflection:
                count += 1
                yield record
