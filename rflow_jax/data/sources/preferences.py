"""Pairs of images of one prompt with a preference: JSON lines, or records of GenRef."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from rflow_jax.data.config import DataConfig
from rflow_jax.data.records import RecordSource, read_image
from rflow_jax.data.sources.open import open_source
from rflow_jax.errors import InputError
from rflow_jax.utils.files import fingerprint_of
from rflow_jax.utils.json_files import read_json_lines, text_of

# The original's label numbers.
A, B, TIE, INVALID = 1, -1, 0, 22
LABELS = {"A": A, "B": B, "same": TIE}
NO_SCORE = 0.0  # the original's, too
log = logging.getLogger(__name__)


class Pair(NamedTuple):
    """Two encoded images of one prompt.

    Attributes:
        key: the name of the pair in messages.
        label: A, B, TIE or INVALID.
        score_a, score_b: ratings by people; 0 where there are none.
    """

    key: str
    prompt: str
    image_a: bytes
    image_b: bytes
    label: int
    score_a: float = NO_SCORE
    score_b: float = NO_SCORE


@runtime_checkable
class PairSource(Protocol):
    """Random access to pairs. It can be pickled, to be read in worker processes.

    Attributes:
        fingerprint: of the pairs and their order.
        labels: those that occur.
        has_scores: whether any image has a score.
    """

    @property
    def fingerprint(self) -> str: ...

    @property
    def labels(self) -> frozenset[int]: ...

    @property
    def has_scores(self) -> bool: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Pair:
        """Reads one pair; raises RecordError where it cannot be used."""
        ...


class _Line(NamedTuple):
    source: str
    prompt: str
    image_a: str
    image_b: str
    label: int
    scores: tuple[float, float]


@dataclass(frozen=True)
class PairFile:
    """The pairs of a file of JSON lines: ``prompt``, ``image_a`` and ``image_b`` (relative to the file), ``label``.

    ``label`` is ``A``, ``B`` or ``same``, or anything else if unknown; ``score_a`` and ``score_b`` are optional.
    """

    folder: Path
    lines: tuple[_Line, ...]
    fingerprint: str

    @classmethod
    def open(cls, path: Path) -> PairFile:
        """Reads the lines but not the images; raises InputError, naming the line, if one is unusable."""
        lines = tuple(_line(source, record) for source, record in read_json_lines(path, "file of pairs"))
        if without := sum(line.label == INVALID for line in lines):
            log.warning("%s: %d of %d lines have no label A, B or same", path, without, len(lines))
        return cls(path.parent, lines, fingerprint_of(path))

    @property
    def labels(self) -> frozenset[int]:
        return frozenset(line.label for line in self.lines)

    @property
    def has_scores(self) -> bool:
        return any(any(line.scores) for line in self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    def read(self, index: int) -> Pair:
        line = self.lines[index]
        a, b = (read_image(self.folder / name, line.source) for name in (line.image_a, line.image_b))
        return Pair(line.source, line.prompt, a, b, line.label, *line.scores)


@dataclass(frozen=True)
class GenRefPairs:
    """The records of GenRef; the good image is A and preferred."""

    source: RecordSource
    labels = frozenset({A})
    has_scores = False

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def __len__(self) -> int:
        return sum(self.source.counts.values())

    def read(self, index: int) -> Pair:
        for subset, count in self.source.counts.items():
            if index < count:
                record = self.source.read(subset, index)
                return Pair(record.key, record.prompt, record.good_image, record.bad_image, A)
            index -= count
        raise IndexError(index)


def open_pairs(pairs: str | None, path: str | list[str] | None, **options: Any) -> PairSource:
    """The pairs of a file of JSON lines, or of shards of GenRef.

    Args:
        options: further fields of :class:`~rflow_jax.data.config.DataConfig` for these.

    Raises:
        InputError: they are unusable, or there are none.
    """
    if pairs is not None:
        return PairFile.open(Path(pairs).expanduser())
    assert path is not None
    found = GenRefPairs(open_source(DataConfig(path, **options)))
    if not len(found):
        raise InputError(f"{path}: contains no records")
    return found


def _line(source: str, record: Mapping[str, Any]) -> _Line:
    label = LABELS.get(str(record.get("label")), INVALID)
    prompt, image_a, image_b = (text_of(dict(record), key, source) for key in ("prompt", "image_a", "image_b"))
    scores = _score(record, "score_a", source), _score(record, "score_b", source)
    return _Line(source, prompt, image_a, image_b, label, scores)


def _score(record: Mapping[str, Any], key: str, source: str) -> float:
    value = record.get(key)
    if value is None:
        return NO_SCORE
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{source}: {key} is {value!r}: give a number")
    return float(value)
