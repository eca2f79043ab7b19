"""``rflow report DIR [DIR ...]``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from rflow_jax.report.curves import count, summary_table
from rflow_jax.report.page import write_page
from rflow_jax.report.runs import read_runs
from rflow_jax.utils.cli import Command


@dataclass(frozen=True)
class ReportConfig:
    """The searches to show, and the folder of the page.

    Attributes:
        runs: folders of searches (their --out); several are shown side by side.
        out: folder for index.html; without it the first search's.
    """

    runs: list[str]
    out: str | None = None


def command(name: str, argv: Sequence[str]) -> Command:
    """The command; the folders may be given without their flag."""
    return Command((ReportConfig,), report, ("runs",))


def report(config: ReportConfig) -> int:
    """Writes the page and prints the table; returns the exit status."""
    runs = read_runs([Path(folder) for folder in config.runs])
    page = write_page(runs, None if config.out is None else Path(config.out))
    # A table takes no more than it needs; in a narrow terminal its lines break, and no number is cut off.
    Console(width=200).print(summary_table(runs))
    print(f"{page}: {', '.join(count(len(run.prompts), 'prompt') + f' of {run.folder}' for run in runs)}")
    return 0
