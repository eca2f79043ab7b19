"""Images that a search begins with: those of an earlier run, ours or the original's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rflow_jax.errors import InputError
from rflow_jax.search.store import SAMPLES, check_entry, folder_of

_NUMBERS = re.compile(r"\d+")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def given_images(folder: Path, entries: Mapping[int, Mapping[str, Any]]) -> dict[int, list[Path]]:
    """The first images of each prompt, in the order in which they were made.

    Ours lie in ``00000/samples/00000.png``; the original's noise search names them ``{round}_round@{seed}.png`` there.

    Raises:
        InputError: a prompt has none, or its folder belongs to another prompt.
    """
    found = {}
    for index, entry in entries.items():
        samples = folder_of(folder, index) / SAMPLES
        check_entry(folder, index, entry)
        found[index] = image_files(samples)
        if not found[index]:
            raise InputError(f"{samples}: no images to begin with; prompt {index} of the prompt file needs some")
    return found


def image_files(folder: Path) -> list[Path]:
    """The images in a folder, in the order of the numbers in their names; none if there is no such folder."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted((file for file in files if file.suffix.lower() in SUFFIXES), key=_in_number)


def _in_number(file: Path) -> tuple[list[int], str]:
    """Rounds count as numbers: 2 comes before 10."""
    return [int(number) for number in _NUMBERS.findall(file.stem)], file.name
