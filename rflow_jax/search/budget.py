"""Usage of a run over all its starts: seconds, images, calls, tokens, dollars."""

from __future__ import annotations

import json
import math
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from rflow_jax.errors import InputError
from rflow_jax.openai_client.usage import Usage, UsageTracker
from rflow_jax.utils.atomic_io import remove_beginnings, write_file
from rflow_jax.utils.json_files import read_json

EVERY = 10.0  # seconds between writes


class Budget:
    """A meter for each role, and the file that keeps them: ``usage.json`` (``usage_{k}.json`` for further processes).

    Args:
        budget: US dollars; None for no limit.
    """

    def __init__(self, out: Path, process_index: int, roles: tuple[str, ...], budget: float | None) -> None:
        self._path = out / (f"usage_{process_index}.json" if process_index else "usage.json")
        self._budget = budget
        try:
            content = read_json(self._path) if self._path.exists() else None
        except InputError:
            content = None
        before = content if isinstance(content, dict) else {}
        self._seconds = float(_number(before.get("seconds")))
        self._images = int(_number(before.get("images")))
        spent_by = before.get("roles")
        spent_by = spent_by if isinstance(spent_by, dict) else {}
        known = {field.name for field in fields(Usage)}
        self.meters = {}
        for role in roles:
            spent = spent_by.get(role)
            usage = {key: _number(value) for key, value in spent.items()} if isinstance(spent, dict) else {}
            if isinstance(spent, dict) and "cost" in spent and spent["cost"] is None:
                usage["cost"] = None  # no price is known
            self.meters[role] = UsageTracker(Usage(**{key: value for key, value in usage.items() if key in known}))
        self._began = self._written = time.monotonic()
        self._owned = False

    def total(self) -> Usage:
        """All roles together."""
        return sum((meter.snapshot() for meter in self.meters.values()), Usage())

    def over_budget(self) -> str | None:
        """Why no further call should be made, or None."""
        if self._budget is None:
            return None
        cost = self.total().cost
        if cost is None or cost < self._budget:
            return None
        return f"the budget of ${self._budget:g} is spent (${cost:.2f})"

    def write(self, images: int, busy: float | None, now: bool = True) -> None:
        """Writes the file.

        Args:
            images: made since this start.
            busy: fraction of the time that the generator was busy.
            now: write even if the file was written less than :data:`EVERY` seconds ago.
        """
        moment = time.monotonic()
        if not now and moment - self._written < EVERY:
            return
        self._written = moment
        if not self._owned:  # not earlier: until the folder is claimed, another process may be writing there
            remove_beginnings(self._path.parent, self._path.name)
            self._owned = True
        total = self.total()
        content = {
            "seconds": round(self._seconds + moment - self._began, 1),
            "images": self._images + images,
            "generator_busy": None if busy is None else round(busy, 4),
            "cost": total.cost,
            "roles": {role: meter.snapshot().as_dict() for role, meter in self.meters.items()},
        }
        write_file(self._path, json.dumps(content, indent=2) + "\n")


def _number(value: Any) -> Any:
    """A number from 0 as it is; 0 for anything else that a damaged file may hold."""
    usable = type(value) in (int, float) and math.isfinite(value) and value >= 0
    return value if usable else 0
