"""One record of GenRef, and what every store of them can do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

T = TypeVar("T")
log = logging.getLogger(__name__)

SUBSETS = ("general", "length", "rule", "editing")


class Record(NamedTuple):
    """A pair of pictures of one prompt, as it is stored.

    Attributes:
        key: its name in the store.
        subset: one of :data:`SUBSETS`.
        reflection: what to change in the bad picture to get the good one; may be empty.
        good_image, bad_image: encoded pictures (JPEG, PNG, WebP).
    """

    key: str
    subset: str
    prompt: str
    reflection: str
    good_image: bytes
    bad_image: bytes


class RecordError(Exception):
    """A record that cannot be used (a corrupt picture, a missing member); says which and why."""


@runtime_checkable
class RecordSource(Protocol):
    """Random access to the records of each subset. It can be pickled, to be read in worker processes.

    Attributes:
        counts: records of each subset.
        fingerprint: of the set of records and their order; a checkpoint is only resumed on the same one.
    """

    @property
    def counts(self) -> Mapping[str, int]: ...

    @property
    def fingerprint(self) -> str: ...

    def read(self, subset: str, index: int) -> Record:
        """Reads one record.

        Raises:
            RecordError: it cannot be used.
        """
        ...


def first_held_out(prepare: Callable[[int], T], records: int, count: int) -> tuple[list[T], str]:
    """What ``prepare`` makes of the first ``count`` usable records, and why the last unusable one is none.

    Unusable ones are told.
    """
    found: list[T] = []
    trouble = ""
    for index in range(records):
        if len(found) == count:
            break
        try:
            found.append(prepare(index))
        except RecordError as error:
            trouble = str(error)
            log.warning("validation: skipped %s", trouble)
    return found, trouble


def read_image(path: Path, where: str) -> bytes:
    """The bytes of a picture that a line names; raises RecordError where there are none."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise RecordError(f"{where}: {path}: cannot read this picture ({error})") from error
