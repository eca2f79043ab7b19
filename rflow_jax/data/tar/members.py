"""The members of a tar of GenRef, grouped to samples the way WebDataset does."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from tarfile import ReadError, TarFile, TarInfo
from typing import Any, Generic, TypeVar

from rflow_jax.data.records import SUBSETS, Record, RecordError

T = TypeVar("T")

MEMBERS = ("good_image", "bad_image", "prompt.txt", "reflection.txt", "subset.txt")
GOOD, BAD, PROMPT, REFLECTION, SUBSET = range(len(MEMBERS))
_EXTENSIONS = {"jpg", "jpeg", "png", "webp"}
# The same split as webdataset.tariterators.base_plus_ext: the key ends at the first dot of the base name.
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")

# A plain TarFile takes these for the end of the archive. They are not in the type stubs.
_BAD_HEADERS: tuple[type[Exception], ...] = tuple(
    getattr(tarfile, name) for name in ("InvalidHeaderError", "TruncatedHeaderError", "EmptyHeaderError")
)


class DamagedTar(Exception):
    """A tar that cannot be read on from here; says why."""


@dataclass
class Sample(Generic[T]):
    """Members that follow each other and share a key.

    Attributes:
        found: for each of :data:`MEMBERS` what was found; None where there is none.
        trouble: why it cannot be used; empty if it can.
    """

    key: str
    found: list[T | None]
    trouble: str = ""

    def check(self) -> Sample[T]:
        """Itself, with its trouble said if a member is missing."""
        missing = [name for name, one in zip(MEMBERS, self.found, strict=True) if one is None]
        if missing and not self.trouble:
            self.trouble = f"has no {' and no '.join(missing)}"
        return self


class _Header(TarInfo):
    """A header that is not taken for the end of the tar when it is damaged or cut."""

    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> TarInfo:
        try:
            return super().fromtarfile(tarfile)
        except _BAD_HEADERS as error:
            raise ReadError(f"{error or 'no end mark'} at byte {vars(tarfile)['offset']}") from None


def open_tar(file: Any, *, stream: bool) -> TarFile:
    """A tar whose damage shows as an error.

    Args:
        file: seekable, unless it is a stream, which may be compressed too.

    Raises:
        DamagedTar: it does not begin like a tar.
    """
    try:
        return tarfile.open(fileobj=file, mode="r|*" if stream else "r:", tarinfo=_Header)
    except tarfile.TarError as error:
        raise DamagedTar(f"not a tar file ({error})") from error


def headers(tar: TarFile) -> Iterator[TarInfo]:
    """The regular files of a tar, one after the other; memory does not grow.

    Raises:
        DamagedTar: the tar is damaged or cut here.
    """
    try:
        while (header := tar.next()) is not None:
            vars(tar)["members"] = []  # it would keep them all
            if header.isreg() and not header.issparse():
                yield header
    except (tarfile.TarError, EOFError) as error:
        raise DamagedTar(str(error)) from error


def samples(members: Iterable[tuple[str, T]]) -> Iterator[Sample[T]]:
    """Groups members that follow each other; those of other data sets and lone files are left out.

    Args:
        members: name in the tar, and what stands for its content.
    """
    current: Sample[T] | None = None
    for name, content in members:
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        key, member = match[1], _member(match[2].lower())
        if current is not None and key != current.key:
            yield current.check()
            current = None
        if member is None:
            continue
        if current is None:
            current = Sample(key, [None] * len(MEMBERS))
        if current.found[member] is not None:
            current.trouble = f"has two of {MEMBERS[member]}"
        current.found[member] = content
    if current is not None:
        yield current.check()


def subset_of(text: bytes) -> int | None:
    """The place in :data:`~rflow_jax.data.records.SUBSETS` of what a ``subset.txt`` says; None if not there."""
    name = text.decode("utf-8", "replace").strip()
    return SUBSETS.index(name) if name in SUBSETS else None


def make_record(key: str, subset: str, members: list[bytes]) -> Record:
    """A record from the contents of its members.

    Raises:
        RecordError: a text is no UTF-8, or a picture is empty.
    """
    for member in (GOOD, BAD):
        if not members[member]:
            raise RecordError(f"{key}: {MEMBERS[member]} is empty")
    try:
        prompt, reflection = members[PROMPT].decode(), members[REFLECTION].decode()
    except UnicodeDecodeError as error:
        raise RecordError(f"{key}: a text is not UTF-8 ({error})") from error
    return Record(key, subset, prompt, reflection, members[GOOD], members[BAD])


def _member(rest: str) -> int | None:
    """Which member it is, of what follows the key; None for one that is none of ours."""
    stem, _, extension = rest.rpartition(".")
    name = stem if extension in _EXTENSIONS else rest
    return MEMBERS.index(name) if name in MEMBERS else None
