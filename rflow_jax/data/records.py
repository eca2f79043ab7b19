"""One record of GenRef, and the protocol of its sources."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from rflow_jax.utils.images import picture_bytes

T = TypeVar("T")
log = logging.getLogger(__name__)

SUBSETS = ("general", "length", "rule", "editing")


class Record(NamedTuple):
    """A pair of images of one prompt, as stored.

    Attributes:
        subset: one of :data:`SUBSETS`.
        reflection: what to change in the bad image to get the good one; may be empty.
        good_image, bad_image: encoded (JPEG, PNG, WebP).
    """

    key: str
    subset: str
    prompt: str
    reflection: str
    good_image: bytes
    bad_image: bytes


class RecordError(Exception):
    """A record that cannot be used (a corrupt image, a missing member); says which and why."""


@runtime_checkable
class Counted(Protocol):
    """Records of any kind, by subset.

    Attributes:
        counts: records of each subset.
        fingerprint: of the set of records and their order; a checkpoint is only resumed on the same one.
    """

    @property
    def counts(self) -> Mapping[str, int]: ...

    @property
    def fingerprint(self) -> str: ...


@runtime_checkable
class RecordSource(Counted, Protocol):
    """Random access to the records of each subset. It can be pickled, to be read in worker processes."""

    def read(self, subset: str, index: int) -> Record:
        """Reads one record; raises RecordError where it cannot be used."""
        ...


def first_held_out(prepare: Callable[[int], T], records: int, count: int) -> tuple[list[T], str]:
    """``prepare`` of the first ``count`` usable records, and the last error; the others are skipped and logged."""
    found: list[T] = []
    last_error = ""
    for index in range(records):
        if len(found) == count:
            break
        try:
            found.append(prepare(index))
        except RecordError as error:
            last_error = str(error)
            log.warning("validation: skipped %s", last_error)
    return found, last_error


def read_image(path: Path, source: str) -> bytes:
    """The bytes of an image file; raises RecordError, which begins with ``source``, where it cannot be read."""
    try:
        return picture_bytes(path)
    except (OSError, ValueError) as error:
        raise RecordError(f"{source}: {path}: cannot read this picture ({error})") from error
