"""What a checkpoint is exported with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Exporter(Protocol):
    """Writes what was trained in the form that other programs read.

    Attributes:
        exports: where in the run's folder that of a step goes, such as ``lora/{step}``, with the step at its end; None:
            there is no such form.
    """

    @property
    def exports(self) -> str | None: ...

    def export(self, trainable: Any, folder: Path | None) -> None:
        """Is called in every process, with a folder to make in the first alone."""
        ...
