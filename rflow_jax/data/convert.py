"""GenRef in other forms: ``python -m rflow_jax.data.convert tfds SHARDS OUT``, ``... precompute ... OUT``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rflow_jax import cli
from rflow_jax.data.latents.source import PrecomputeConfig
from rflow_jax.data.storage.patience import Patience
from rflow_jax.errors import InputError


@dataclass(frozen=True)
class TfdsConfig:
    """What is written as a data set of TFDS.

    Attributes:
        shards: tar files, as for training.
        out: folder; the data set goes to genref/1.0.0 in it.
        cache: folder of the shards' indexes; null: ~/.cache/rflow_jax/genref.
        patience: how long a server is waited for.
    """

    shards: str | list[str]
    out: str
    cache: str | None = None
    patience: Patience = field(default_factory=Patience)


def tfds(config: TfdsConfig) -> None:
    """Tar shards -> ArrayRecord."""
    from rflow_jax.data.tar.source import open_tars
    from rflow_jax.data.tfds.source import import_tfds

    import_tfds()  # said before shards are indexed, and not after
    from rflow_jax.data.tfds.builder import write_tfds

    source = open_tars(config.shards, cache=Path(config.cache) if config.cache else None, patience=config.patience)
    folder = write_tfds(source, Path(config.out))
    counts = ", ".join(f"{name} {count}" for name, count in source.counts.items())
    print(f"{folder}: {sum(source.counts.values())} records ({counts})")


def precompute(config: PrecomputeConfig) -> None:
    """Tar shards or a data set of TFDS -> latents and embeddings."""
    from rflow_jax.data.latents.precompute import precompute as run
    from rflow_jax.parallel.runtime import use_compilation_cache

    use_compilation_cache()
    counts = run(config)
    print(f"{config.out}: {sum(counts.values())} records")


COMMANDS = {
    "tfds": cli.Command("Write tar shards as a data set of TFDS: convert tfds SHARDS OUT.", (TfdsConfig,), tfds),
    "precompute": cli.Command(
        "Encode records once: convert precompute --model M --data.shards SHARDS OUT.", (PrecomputeConfig,), precompute
    ),
}


def main(argv: Sequence[str] | None = None) -> int | None:
    """The command line; the folder may be given without its flag, and so may the shards of ``tfds``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return cli.dispatch(COMMANDS, "GenRef in other forms.", name_places(argv))


def name_places(argv: list[str]) -> list[str]:
    """The command line with flags in place of bare words: the last is the folder, those before it are shards.

    Raises:
        InputError: there are too many.
    """
    if not argv or argv[0] not in COMMANDS:
        return argv
    bare, rest = cli.bare_words(argv[1:])
    shards, out = bare[:-1], bare[-1:]
    if shards and argv[0] != "tfds":
        raise InputError(f"{argv[0]}: {shards[0]} is too much; give one folder, and the shards as --data.shards")
    flags = [f"--out={word}" for word in out]
    if shards:
        flags.append(f"--shards={shards[0] if len(shards) == 1 else json.dumps(shards)}")
    return [argv[0], *flags, *rest]


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
