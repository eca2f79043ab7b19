"""Progress bars on standard error, drawn only if it is a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


def byte_progress(show: bool = True) -> Progress:
    """A bar that counts bytes; it disappears when done."""
    return _progress(show, BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())


def count_progress(show: bool = True) -> Progress:
    """A bar that counts items, with a spinner; it disappears when done."""
    return _progress(
        show, SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )


def _progress(show: bool, *columns: ProgressColumn) -> Progress:
    console = Console(stderr=True)
    disabled = not (show and console.is_terminal)
    return Progress(TextColumn("{task.description}"), *columns, console=console, transient=True, disable=disabled)
