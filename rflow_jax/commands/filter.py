"""``rflow filter``: the verifier's best among a prompt's first k images, for several k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rflow_jax.errors import InputError
from rflow_jax.search.prompt_folder import RECORDS, link, read_records
from rflow_jax.search.run_folder import CONFIG
from rflow_jax.utils.cli import Command
from rflow_jax.utils.ranges import Count, require_ranges
from rflow_jax.verifiers.base import Verdict, read_verdict
from rflow_jax.verifiers.ranking import best_first


@dataclass(frozen=True)
class FilterConfig:
    """The search to choose from.

    Attributes:
        folder: of a search.
        k: how many of the first images are looked at; where a prompt has fewer, all of them.
        corrections_only: leave out the images before the first correction, as the original does.
    """

    folder: str
    k: list[Count] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    corrections_only: bool = False

    def __post_init__(self) -> None:
        require_ranges(self)
        if not self.k:
            raise InputError("k is empty: give numbers of images")


def best_of_first(verdicts: list[Verdict], k: int) -> int:
    """The best of the first k, the first of equals; a position."""
    return best_first(verdicts[:k])[0]


def command(name: str, argv: Sequence[str]) -> Command:
    """The command; the folder may be given without its flag."""
    return Command((FilterConfig,), filter_nfe, ("folder",))


def filter_nfe(config: FilterConfig) -> int:
    """Writes ``{prompt}/nfe{k}/00000.png`` for each k; returns the exit status.

    Raises:
        InputError: the folder contains no search, or none of its prompts is done, or its images have no verdicts.
    """
    root = Path(config.folder)
    if not (root / CONFIG).is_file():
        raise InputError(f"{root}: not the folder of a search ({CONFIG} is missing)")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name.isdecimal())
    done = [path for path in folders if (path / RECORDS).exists()]
    if not done:
        raise InputError(f"{root}: none of its {len(folders)} prompts is done yet")
    for folder in done:
        _link_best(folder, config)
    left = f"; {len(folders) - len(done)} prompts are not done yet" if len(done) < len(folders) else ""
    print(f"{root}: nfe{', nfe'.join(map(str, config.k))} of {len(done)} prompts{left}")
    return 0


def _link_best(folder: Path, config: FilterConfig) -> None:
    records = read_records(folder)
    if config.corrections_only:
        # A search that was done before its first correction has none: then the best of all is among the others.
        records = [record for record in records if record["stage"] == "reflect"] or records
    if any(record["verdict"] is None for record in records):
        raise InputError(f"{folder}: its images have no verdicts; filter chooses by them")
    verdicts = [read_verdict(record["verdict"]) for record in records]
    for k in config.k:
        target = folder / f"nfe{k}"
        target.mkdir(exist_ok=True)
        best = records[best_of_first(verdicts, k)]
        if best.get("error") is None:  # else none of them could be made
            link(folder / best["file"], target / "00000.png")
