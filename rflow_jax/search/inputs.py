"""Prompt files: GenEval metadata, one JSON object a line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rflow_jax.errors import InputError
from rflow_jax.search.prompt_folder import SAMPLES, check_entry, folder_of
from rflow_jax.utils.json_files import read_json_lines

_EXAMPLE = '{"prompt": "...", "tag": "counting"}'


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a prompt file, in order; each has at least ``prompt``.

    Empty lines are skipped. A position in this list names the prompt's folder and enters its seeds.

    Raises:
        InputError: the file cannot be read, or a line is not an entry; says file and line.
    """
    return [_entry(entry, source) for source, entry in read_json_lines(Path(path), "prompt file", _EXAMPLE)]


def slice_prompts(entries: list[dict[str, Any]], start: int, end: int | None) -> dict[int, dict[str, Any]]:
    """The entries from ``start`` up to ``end`` (None or -1: to the last) by their index in the file.

    Raises:
        InputError: nothing is left.
    """
    stop = len(entries) if end is None or end == -1 else min(end, len(entries))
    if start < 0 or start >= stop:
        given = f"--start {start}" if end is None else f"--start {start} --end {end}"
        raise InputError(f"{given} leaves none of the {len(entries)} prompts")
    return {index: entries[index] for index in range(start, stop)}


def _entry(entry: dict[str, Any], source: str) -> dict[str, Any]:
    prompt = entry.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{source}: 'prompt' must be a text that is not empty")
    if not isinstance(entry.get("tag", ""), str):
        raise InputError(f"{source}: 'tag' must be a text such as \"counting\"")
    for key in ("include", "exclude"):
        objects = entry.get(key, [])
        if not isinstance(objects, list) or not all(isinstance(one, dict) for one in objects):
            raise InputError(f'{source}: \'{key}\' must be a list of objects such as {{"class": "cat"}}')
    return entry


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
    files = [file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES] if folder.is_dir() else []
    # Rounds count as numbers: 2 comes before 10.
    return sorted(files, key=lambda file: ([int(number) for number in _NUMBERS.findall(file.stem)], file.name))
