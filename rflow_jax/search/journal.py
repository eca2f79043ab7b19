"""What has happened to a prompt so far: lines that are only ever added, so that a killed run can go on.

A line that was cut by a kill is dropped when the journal is opened again: what it said happens once more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rflow_jax.files import append_line, whole_lines

JOURNAL = "journal.jsonl"


def json_line(value: Mapping[str, Any]) -> str:
    """One line of JSON, readable in any script; only ``\\n`` ends it, since a text may hold other separators."""
    text = json.dumps(value, ensure_ascii=False, default=_plain)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"  # half a surrogate pair is \\ud800 in JSON too


def _plain(value: Any) -> Any:
    """What JSON can hold of a number or an array of NumPy, or of anything else that a class of one's own gives."""
    for convert in ("tolist", "item"):
        if callable(method := getattr(value, convert, None)):
            return method()
    return str(value)


class Journal:
    """The journal of one prompt: what is known of each of its images, by the image's position.

    Args:
        path: of the file; it is made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[int, dict[str, Any]] = {}
        for line in whole_lines(path):
            self._remember(json.loads(line))

    def known(self, position: int, what: str) -> Any:
        """What was noted of an image, or None."""
        return self._known.get(position, {}).get(what)

    def note(self, position: int, what: str, value: Any) -> None:
        """Adds a line."""
        entry = {"id": position, what: value}
        append_line(self._path, json_line(entry))
        self._remember(entry)

    def remove(self) -> None:
        """Deletes the file: everything stands in the records."""
        self._path.unlink(missing_ok=True)

    def _remember(self, entry: dict[str, Any]) -> None:
        self._known.setdefault(entry.pop("id"), {}).update(entry)
