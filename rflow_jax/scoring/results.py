"""The file of verdicts: JSON lines appended as they come, so that a killed run loses none."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rflow_jax.errors import InputError
from rflow_jax.scoring.targets import Target
from rflow_jax.search.prompt_folder import json_line
from rflow_jax.utils.atomic_io import (
    SyncGroup,
    append_line,
    is_blank,
    make_folder,
    remove_beginnings,
    set_aside_and_say,
    truncate_partial_line,
    write_file,
)
from rflow_jax.utils.files import LARGEST_JOURNAL, read_bytes
from rflow_jax.utils.json_files import parse_json_line
from rflow_jax.utils.output_folder import try_lock
from rflow_jax.utils.shown import escaped
from rflow_jax.verifiers.base import Verdict, read_verdict

# A line of this file to any of its characters; a list of images and prompts begins alike.
_BEGINNING = re.compile(rb'\{"image": "(?:[^"\\]|\\.)*(?:\\?|"(?P<rest>.*))', re.DOTALL)
_START, _REST = b'{"image": "', b', "item": {'


@dataclass(frozen=True)
class ImageResult:
    """The result for one image.

    Attributes:
        sha256: of the file's bytes; None if it could not be read.
        verifier: its name; None where there was none, or an older file does not say.
    """

    target: Target
    sha256: str | None
    verdict: Verdict
    verifier: str | None = None


class Results:
    """The file and its content; a context manager that locks other processes out.

    A new file is created by :meth:`begin`.

    Args:
        path: of the file; None: nothing is stored.
        verifier: the settings that scores follow from.

    Raises:
        InputError: the file cannot be used, contains something else, or another process writes into it.
    """

    def __init__(self, path: Path | None, verifier: Mapping[str, Any]) -> None:
        self._path = path
        self._settings = hashlib.sha256(json.dumps(verifier, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self._lines: dict[str, dict[str, Any]] = {}
        self._scored: dict[str, tuple[Verdict, str | None]] = {}
        self._held: IO[bytes] | None = None
        self._group = SyncGroup()
        if path is not None:
            self._path = path = Path(os.path.realpath(path))  # a link stays one when the file is replaced
            if path.exists():
                self.begin()
            else:
                # Checked before anything expensive begins, though the file is created after it.
                parent = next(parent for parent in path.parents if parent.exists())
                if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
                    raise InputError(f"{path}: {parent} is not a writable folder; give another file as --out")

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._held is not None:
            self._held.close()

    def begin(self) -> None:
        """Creates the file if it is new, and locks other processes out from now on."""
        if self._path is None or self._held is not None:
            return
        path = self._path
        make_folder(path.parent)
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is not a regular file; give another as --out")
        self._held = try_lock(path)
        if self._held is None:
            raise InputError(f"{path}: another process is writing into it; wait for it, or give another --out")
        try:
            remove_beginnings(path.parent, path.name)
            self._read(path)
        except BaseException:
            self._held.close()
            raise

    def __bool__(self) -> bool:
        """Whether any score is known."""
        return bool(self._scored)

    def known(self, target: Target, sha256: str) -> ImageResult | None:
        """This verifier's earlier result for these bytes and this prompt, if it is a score."""
        kept = self._scored.get(_key(sha256, self._settings, target.item))
        return kept and ImageResult(target, sha256, *kept)

    def add(self, found: ImageResult) -> None:
        """Appends a verdict, whole or not at all; one that is missing is asked for again, and not noted."""
        self.begin()
        if self._path is not None and not found.verdict.missing:
            append_line(self._path, json_line(self._line(found)), sync=self._group.due())

    def finish(self, all_found: Iterable[ImageResult]) -> None:
        """Rewrites the file in order: its other lines, then one line for each of these images that has a verdict."""
        self.begin()
        if self._path is None:
            return
        for found in all_found:
            if found.verdict.missing:
                continue
            line = self._line(found)
            key = _line_key(line)
            self._lines.pop(key, None)
            self._lines[key] = line
        write_file(self._path, "".join(map(json_line, self._lines.values())))

    def _line(self, found: ImageResult) -> dict[str, Any]:
        return {
            "image": shown(found.target.path),
            "item": dict(found.target.item),
            "verifier": found.verifier,
            "settings": self._settings,
            "sha256": found.sha256,
            "verdict": asdict(found.verdict),
        }

    def _read(self, path: Path) -> None:
        """Raises InputError for a file of another program, which stays as it is."""
        content = read_bytes(path, "file of scores", LARGEST_JOURNAL)
        end = content.rfind(b"\n") + 1
        torn, damaged = content[end:], []
        for number, text in enumerate(content[:end].split(b"\n")[:-1], 1):
            try:
                self._take(text, f"{path}:{number}")
            except (InputError, ValueError, KeyError, TypeError, AttributeError):
                damaged.append(number)
        others = damaged[:1] if not self._lines else []
        if torn and not self._lines and not _begins(torn):
            others = others or [1]
        if others and not is_blank(content):
            raise InputError(f"{path}:{others[0]}: not a line of rflow score; give another file as --out")
        if damaged or (others and torn):
            self._repair(path, damaged)
        elif torn:
            truncate_partial_line(path, torn)

    def _take(self, text: bytes, source: str) -> None:
        """Raises one of several errors if the text is not a line of this file."""
        line = parse_json_line(text, source)
        verdict, line_key = read_verdict(line["verdict"]), _line_key(line)
        key = _key(line["sha256"], line["settings"], line["item"])
        self._lines[line_key] = line
        if verdict.scored:
            self._scored[key] = verdict, line.get("verifier")

    def _repair(self, path: Path, damaged: list[int]) -> None:
        """Sets the file aside and writes its whole lines anew."""
        where = f"line {damaged[0]}" if len(damaged) == 1 else f"{len(damaged)} lines"
        set_aside_and_say(path, where if damaged and self._lines else "all of it")
        write_file(path, "".join(map(json_line, self._lines.values())))
        if self._held is not None:
            self._held.close()
        self._held = try_lock(path)
        if self._held is None:
            raise InputError(f"{path}: another process is writing into it; wait for it, or give another --out")


def shown(path: Path) -> str:
    """A path as one line of text, whatever bytes it consists of."""
    return escaped(os.fsencode(path).decode("utf-8", "backslashreplace"))


def _key(sha256: str | None, settings: str, item: Mapping[str, Any]) -> str:
    return json.dumps([sha256, settings, item], sort_keys=True)


def _line_key(line: Mapping[str, Any]) -> str:
    """The key of an image, prompt and verifier: a later line replaces an earlier one with the same key."""
    return _key(line["image"], line["settings"], line["item"])


def _begins(torn: bytes) -> bool:
    """Whether this can be the beginning of a truncated line."""
    if len(torn) <= len(_START):
        return _START.startswith(torn)
    match = _BEGINNING.fullmatch(torn)
    rest = match and (match["rest"] or b"")
    return rest is not None and (rest.startswith(_REST) or _REST.startswith(rest))
