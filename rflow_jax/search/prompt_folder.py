"""The folder of one prompt, and its append-only journal, from which a killed run resumes.

A line that was cut by a kill is dropped when the journal is opened again; that step is repeated. Files that are damaged
in another way are set aside, and what is missing is done again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL.Image import Image

from rflow_jax.errors import InputError
from rflow_jax.search.lineage import (
    Sample,
    Seed,
    best_of_all,
    best_of_chains,
    chains,
    is_correction,
    last_round,
    made,
)
from rflow_jax.utils.atomic_io import (
    SyncGroup,
    append_line,
    inside,
    is_blank,
    naming_file,
    remove_beginnings,
    set_aside_and_say,
    sync_folder,
    sync_tree,
    temporary_path,
    write_file,
)
from rflow_jax.utils.files import LARGEST_JOURNAL, is_file, open_regular, read_bytes
from rflow_jax.utils.images import MAX_BYTES, png_bytes, read_image
from rflow_jax.utils.json_files import parse_json_line, read_json
from rflow_jax.utils.json_files import read_records as read_lines
from rflow_jax.verifiers.base import read_verdict
from rflow_jax.verifiers.ranking import with_ensemble_scores
from rflow_jax.writers.base import WriterOutput

JOURNAL = "journal.jsonl"


def json_line(value: Mapping[str, Any]) -> str:
    """One line of JSON, readable in any script; only ``\\n`` ends it, since a text may hold other separators."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=_plain, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"  # half a surrogate pair is \\ud800 in JSON too


def _plain(value: Any) -> Any:
    """A value that JSON can represent, for NumPy's numbers and arrays and for anything that a user's class returns."""
    for convert in ("tolist", "item"):
        if callable(method := getattr(value, convert, None)):
            return method()
    return str(value)


def _finite(value: Any) -> Any:
    """A value with null for numbers that are none in JSON; keys become texts."""
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return _finite(_plain(value))


class Journal:
    """The journal of one prompt: what is known about each of its images, by the image's position.

    Args:
        path: of the file; it is made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[int, dict[str, Any]] = {}
        self._group = SyncGroup()
        self._read(read_bytes(path, "journal", LARGEST_JOURNAL) if path.exists() else b"")

    def known(self, position: int, what: str) -> Any:
        """The entry of an image, or None."""
        return self._known.get(position, {}).get(what)

    def note(self, position: int, what: str, value: Any) -> None:
        """Adds a line."""
        entry = {"id": position, what: value}
        append_line(self._path, json_line(entry), sync=self._group.due())
        self._remember(entry)

    def remove(self) -> None:
        """Deletes the file: the records contain everything."""
        self._path.unlink(missing_ok=True)

    def _remember(self, entry: dict[str, Any]) -> None:
        self._known.setdefault(entry.pop("id"), {}).update(entry)

    def _read(self, content: bytes) -> None:
        """Keeps the lines that are whole; if others stand among them, the file is set aside first."""
        *texts, torn = content.split(b"\n")
        whole, damaged = [], []
        for number, text in enumerate(texts, 1):
            try:
                self._remember(_journal_entry(text, f"{self._path}:{number}"))
                whole.append(text + b"\n")
            except (InputError, ValueError, KeyError, TypeError, AttributeError):
                damaged.append(number)
        if damaged or (content and is_blank(content)):
            set_aside_and_say(self._path, f"line {damaged[0]}" if damaged else "without content")
        if damaged or torn:
            write_file(self._path, b"".join(whole))


def _journal_entry(text: bytes, source: str) -> dict[str, Any]:
    """A line of the journal; raises one of several errors if it is none."""
    entry = parse_json_line(text, source)
    if type(entry["id"]) is not int:
        raise TypeError("id")
    for what, value in entry.items():
        if what == "verdict":
            read_verdict(value)
        elif what != "id":
            made = WriterOutput(**value) if what != "failure" else WriterOutput(None, **value)
            if not all(isinstance(part, str | None) for part in (made.text, made.error)):
                raise TypeError(what)
    return entry


RECORDS, METADATA = "records.jsonl", "metadata.jsonl"
SAMPLES, LAST_ROUND, BEST_OF_CHAINS, BEST = "samples", "samples_lastround", "samples_path_bestround", "samples_best"
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


class PromptFolder:
    """The folder of one prompt.

    Raises:
        InputError: it belongs to another prompt.
    """

    def __init__(self, out: Path, index: int, entry: Mapping[str, Any]) -> None:
        self.path = folder_of(out, index)
        self.index = index
        self.entry = entry
        self._whole: set[str] = set()  # images whose bytes have been checked
        remove_beginnings(self.path)
        check_entry(out, index, entry)
        if not _has_content(metadata := self.path / METADATA):
            if metadata.exists():
                set_aside_and_say(metadata, "without content")
            write_file(metadata, json_line(entry))
        if (records := self.path / RECORDS).exists():
            try:
                _whole_records(self.path)
            except InputError as error:
                set_aside_and_say(records, str(error).removeprefix(f"{records}:").strip())
        self.journal = Journal(self.path / JOURNAL)

    @staticmethod
    def image_name(round_number: int, seed: Seed) -> str:
        """Where an image lies in the folder; ``--seed`` of ``generate`` takes the seed as it stands there."""
        return f"midimg/{round_number}_round@{'-'.join(map(str, seed))}.png"

    def has_image(self, name: str) -> bool:
        """Whether the image is there and as it was written; a damaged file is set aside, a torn one is no file."""
        path = self.path / name
        if not has_end(path):
            if path.is_file():
                print(f"{path}: torn; the image is made again", file=sys.stderr)
            return False
        if name in self._whole:
            return True
        if not _is_whole_png(path):
            set_aside_and_say(path, "a checksum is wrong")
            return False
        self._whole.add(name)
        return True

    def read_image(self, name: str) -> Image:
        return read_image(self.path / name)

    def write_image(self, name: str, image: Image) -> None:
        write_file(self.path / name, png_bytes(image))
        self._whole.add(name)

    def finish(
        self, samples: Sequence[Sample], made_with: Mapping[str, Any], verified: bool, count_first: bool = True
    ) -> None:
        """Fills the folders of results and writes the records; they are the sign that the prompt is done."""
        verdicts = with_ensemble_scores([sample.verdict for sample in samples])
        samples = [replace(sample, verdict=verdict) for sample, verdict in zip(samples, verdicts, strict=True)]
        first = [position for position, sample in enumerate(samples) if not is_correction(sample)]
        self._link_chosen(SAMPLES, samples, first)
        if chains(samples):
            self._link_chosen(LAST_ROUND, samples, last_round(samples))
            self._link_chosen(BEST_OF_CHAINS, samples, best_of_chains(samples, count_first))
        if verified:
            self._link_chosen(BEST, samples, [best_of_all(samples, count_first)])
        lines = []
        for position, sample in enumerate(samples):
            location = {"index": self.index, "id": position, "prompt": self.entry["prompt"]}
            own = asdict(sample) | {"noise_path": [list(seed) for seed in sample.noise_path], "seed": list(sample.seed)}
            parent = {"parent_file": None if sample.parent is None else samples[sample.parent].file}
            # Only corrections use the LoRA.
            lora = {"lora": made_with["lora"] if is_correction(sample) else None}
            lines.append(json_line(location | own | parent | dict(made_with) | lora))
        write_file(self.path / RECORDS, "".join(lines))
        self.journal.remove()

    def _link_chosen(self, folder: str, samples: Sequence[Sample], chosen: Sequence[int]) -> None:
        if (target := self.path / folder).is_symlink():
            raise InputError(f"{target}: is a link to another folder; remove it")
        target.mkdir(exist_ok=True)
        for number, position in enumerate(made(samples, chosen)):
            link(self.path / samples[position].file, target / f"{number:05d}.png")
        sync_folder(target)


def folder_of(out: Path, index: int) -> Path:
    """The folder of a prompt in a run."""
    return out / f"{index:05d}"


def finished_records(out: Path, index: int) -> list[dict[str, Any]] | None:
    """The records of a prompt whose search is finished, else None."""
    folder = folder_of(out, index)
    # A kill between the records and the end of the journal leaves both: then it is finished once more.
    if not (folder / RECORDS).exists() or (folder / JOURNAL).exists():
        return None
    try:
        return _whole_records(folder)
    except InputError:
        return None


def _whole_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a prompt; raises InputError if they are damaged, or an image that they name is."""
    records = read_records(folder)
    for record in records:
        image = folder / record["file"]
        if image.exists() and not has_end(image):
            raise InputError(f"{record['file']} is not a whole PNG file")
    return records


def has_end(path: Path) -> bool:
    """Whether a PNG file is there to its last byte."""
    if not is_file(path) or path.stat().st_size < len(_PNG_END):
        return False
    with open_regular(path) as file:
        file.seek(-len(_PNG_END), os.SEEK_END)
        return file.read() == _PNG_END


def _is_whole_png(path: Path) -> bool:
    """Whether all checksums in a PNG file are right; a link is none, since it may lead anywhere."""
    if path.is_symlink() or not has_end(path):
        return False
    content = memoryview(read_bytes(path, "image", MAX_BYTES))
    place = len(_PNG)
    while content[:place] and place + 12 <= len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        if zlib.crc32(content[place + 4 : end - 4]) != int.from_bytes(content[end - 4 : end], "big"):
            return False
        place = end
    return content[: len(_PNG)] == _PNG and place == len(content)


def _has_content(path: Path) -> bool:
    return path.exists() and not is_blank(read_bytes(path, "prompt"))


def check_entry(out: Path, index: int, entry: Mapping[str, Any]) -> None:
    """Checks that a prompt's folder, if it exists, belongs to this prompt.

    Raises:
        InputError: it belongs to another prompt.
    """
    path = folder_of(out, index) / METADATA
    if not _has_content(path):
        return
    try:
        same = read_json(path) == dict(entry)
    except InputError:
        same = False
    if not same:
        raise InputError(f"{path}: another prompt than number {index} of the prompt file; give another --out")


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a prompt that is done, in the order of their images.

    Raises:
        InputError: a line is not a record; says which.
    """
    path = folder / RECORDS
    records = []
    for source, record in read_lines(path, "records"):
        try:
            inside(folder, record["file"])
            if (verdict := record.get("verdict")) is not None:
                read_verdict(verdict)
            if type(record["round"]) is not int or not isinstance(record.get("stage", ""), str):
                raise TypeError("round or stage")
            records.append({"verdict": None, "stage": "", **record})
        except (InputError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{source}: not a record of an image ({error})") from error
    if not records:
        raise InputError(f"{path}: has no records; run the search again")
    return records


def link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no links; never half a file."""
    temporary = temporary_path(target)
    try:
        os.link(source, temporary)
    except OSError:
        with naming_file(target):
            shutil.copyfile(source, temporary)
            sync_tree(temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # replacing a name by another of the same file leaves both
