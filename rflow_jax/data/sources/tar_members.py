"""The members of GenRef's tars, grouped to samples the way WebDataset does; what a header declares is checked first.

Nothing is ever extracted: a member's name is a name only, and links and devices are left out.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from tarfile import BLOCKSIZE, ReadError, TarFile, TarInfo
from typing import Any, Generic, NamedTuple, TypeVar

from rflow_jax.data.records import SUBSETS, Record, RecordError
from rflow_jax.errors import InputError

T = TypeVar("T")

MEMBERS = ("good_image", "bad_image", "prompt.txt", "reflection.txt", "subset.txt")
GOOD, BAD, PROMPT, REFLECTION, SUBSET = range(len(MEMBERS))
# Bytes of each. A picture of GenRef has 0.75 MB and a text some hundreds; a compressed tar of a few megabytes can
# declare and deliver gigabytes.
LARGEST = (2**26, 2**26, 2**20, 2**20, 64)
LARGEST_SKIPPED = 2**30  # bytes of any member of a stream, all of which have to pass
LONGEST_NAME = 4096  # bytes of a path on Linux
_LARGEST_HEADER = 2**16  # bytes of a long name, or of one member's settings in POSIX's format
_MOST_HEADERS = 16  # of one member, each in front of the next
_MOST_SPARSE = 2**10  # blocks of a map
_EXTENSIONS = {"jpg", "jpeg", "png", "webp"}
# The same split as webdataset.tariterators.base_plus_ext: the key ends at the first dot of the base name.
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")

# A plain TarFile takes these for the end of the archive. They are missing in the type stubs.
_BAD_HEADERS: tuple[type[Exception], ...] = tuple(
    getattr(tarfile, name) for name in ("InvalidHeaderError", "TruncatedHeaderError", "EmptyHeaderError")
)


class DamagedTar(Exception):
    """A tar that cannot be read further; says why."""


class MemberName(NamedTuple):
    """The parts of a member's name.

    Attributes:
        key: of its sample.
        member: its place in :data:`MEMBERS`; None for a file of another kind.
    """

    key: str
    member: int | None

    @classmethod
    def of(cls, name: str) -> MemberName | None:
        """None for a file that belongs to no sample."""
        match = _NAME.fullmatch(name) if len(name) <= LONGEST_NAME else None
        if match is None:
            return None
        rest = match[2].lower()
        stem, _, extension = rest.rpartition(".")
        kind = stem if extension in _EXTENSIONS else rest
        return cls(match[1], MEMBERS.index(kind) if kind in MEMBERS else None)

    def excess(self, size: int) -> str:
        """What is wrong with this size of the member, in bytes; empty if nothing is."""
        if self.member is None or size <= LARGEST[self.member] or self.member == SUBSET:  # such a subset is unknown
            return ""
        return f"has {size:,} bytes as {MEMBERS[self.member]}, and {LARGEST[self.member]:,} are read at most"


@dataclass
class TarSample(Generic[T]):
    """Members with the same key.

    Attributes:
        found: the content of each of :data:`MEMBERS`, or None.
        fault: what is wrong with a member that is there; empty if nothing is.
    """

    key: str
    found: list[T | None]
    fault: str = ""

    @property
    def missing(self) -> list[str]:
        """The members that it lacks."""
        return [name for name, one in zip(MEMBERS, self.found, strict=True) if one is None]

    @property
    def trouble(self) -> str:
        """Why it cannot be used; empty if it can."""
        return self.fault or (f"has no {' and no '.join(self.missing)}" if self.missing else "")

    def completes(self, other: TarSample[T]) -> bool:
        """Whether both lack members, and have none in common."""
        one_of_each = not any(a is not None and b is not None for a, b in zip(self.found, other.found, strict=True))
        return bool(self.missing and other.missing) and not self.fault and not other.fault and one_of_each


class _Header(TarInfo):
    """A header that raises when it is damaged, truncated or without bounds, instead of ending the tar."""

    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> TarInfo:
        # The headers in front of a member's own read the next one by calling this again.
        state = vars(tarfile)
        state["_depth"] = depth = state.get("_depth", 0) + 1
        at = state["offset"]
        try:
            if depth > _MOST_HEADERS:
                raise ReadError(f"more than {_MOST_HEADERS} headers of one member")
            header = super().fromtarfile(tarfile)
            # A negative size would lead back, and round and round.
            if header.size < 0 or state["offset"] <= at:
                raise ReadError("a size below 0")
            return header
        except InputError:  # of the server behind the file, and not about what it holds
            raise
        except _BAD_HEADERS as error:
            raise ReadError(f"{error or 'no end mark'} at byte {at}") from None
        except (ValueError, LookupError, AttributeError, OverflowError) as error:
            raise ReadError(f"a header that cannot be read at byte {at} ({error})") from None
        finally:
            state["_depth"] = depth - 1

    def _proc_gnulong(self, tarfile: TarFile) -> TarInfo:
        self._require_small()
        return super()._proc_gnulong(tarfile)  # pyright: ignore[reportAttributeAccessIssue]

    def _proc_pax(self, tarfile: TarFile) -> TarInfo:
        self._require_small()
        member = super()._proc_pax(tarfile)  # pyright: ignore[reportAttributeAccessIssue]
        if len(tarfile.pax_headers) > _LARGEST_HEADER // 64:  # those for the whole tar are kept
            raise ReadError("too many settings for the whole tar")
        return member

    def _require_small(self) -> None:
        if not 0 <= self.size <= _LARGEST_HEADER:
            raise ReadError(f"a header of {self.size:,} bytes; {_LARGEST_HEADER:,} are read at most")

    def _proc_sparse(self, tarfile: TarFile) -> TarInfo:
        """A sparse member of GNU tar, which is left out; the blocks of its map follow the header."""
        _, more, size = getattr(self, "_sparse_structs")  # noqa: B009 (missing in the type stubs)
        for _ in range(_MOST_SPARSE):
            if not more:
                break
            block = tarfile.fileobj.read(BLOCKSIZE)  # pyright: ignore[reportOptionalMemberAccess]
            if len(block) < BLOCKSIZE:
                raise ReadError("cut in a sparse member")
            more = bool(block[504])
        else:
            raise ReadError("a sparse member in too many pieces")
        _mark_sparse(self)
        stored, self.size = self.size, size
        end = tarfile.fileobj.tell()  # pyright: ignore[reportOptionalMemberAccess]
        self.offset_data, vars(tarfile)["offset"] = end, end + -(-stored // BLOCKSIZE) * BLOCKSIZE
        return self

    def _proc_gnusparse_00(self, next: TarInfo, pax_headers: Any, buf: bytes) -> None:
        _mark_sparse(next)

    def _proc_gnusparse_01(self, next: TarInfo, pax_headers: Any) -> None:
        _mark_sparse(next)

    def _proc_gnusparse_10(self, next: TarInfo, pax_headers: Any, tarfile: TarFile) -> None:
        _mark_sparse(next)


def _mark_sparse(member: TarInfo) -> None:
    member.sparse = []  # pyright: ignore[reportAttributeAccessIssue]


def open_tar(file: Any, *, stream: bool) -> TarFile:
    """A tar whose damage raises an error; a stream need not be seekable, and may be compressed.

    Raises:
        DamagedTar: it does not begin like a tar.
    """
    try:
        return tarfile.open(fileobj=file, mode="r|*" if stream else "r:", tarinfo=_Header)
    except tarfile.TarError as error:
        raise DamagedTar(f"not a tar file ({error})") from error


def headers(tar: TarFile) -> Iterator[TarInfo]:
    """The regular files of a tar, in constant memory; raises DamagedTar where it is damaged or truncated."""
    try:
        while (header := tar.next()) is not None:
            vars(tar)["members"] = []  # it would keep them all
            if header.isreg() and not header.issparse():
                yield header
    except (tarfile.TarError, EOFError) as error:
        raise DamagedTar(str(error)) from error


def content_of(tar: TarFile, header: TarInfo) -> bytes:
    """The bytes of the regular file whose header was read last; fewer where the tar is cut.

    ``extractfile`` makes two file objects for each member, which takes as long as the rest of a small one.
    """
    file: Any = tar.fileobj
    file.seek(header.offset_data)
    return file.read(header.size)


def samples(members: Iterable[tuple[MemberName, T, str]]) -> Iterator[TarSample[T]]:
    """Groups consecutive (name, content, trouble) members; those of other data sets are left out."""
    current: TarSample[T] | None = None
    for (key, member), content, trouble in members:
        if current is not None and key != current.key:
            yield current
            current = None
        if member is None:
            continue
        if current is None:
            current = TarSample(key, [None] * len(MEMBERS))
        if current.found[member] is not None:
            current.fault = f"has two of {MEMBERS[member]}"
        current.found[member] = content
        current.fault = current.fault or trouble
    if current is not None:
        yield current


def gathered(members: Iterable[tuple[MemberName, T, str]]) -> tuple[list[TarSample[T]], TarSample[T] | None]:
    """As :func:`samples`, with members of a sample that lie apart put together.

    Returns:
        The samples in the order of their first members, and the one that the last member belongs to.
    """
    found: list[TarSample[T]] = []
    partial: dict[str, TarSample[T]] = {}
    last = None
    for run in samples(members):
        last = partial.get(run.key)
        if last is not None and last.completes(run):
            last.found = [a if a is not None else b for a, b in zip(last.found, run.found, strict=True)]
            continue
        found.append(run)
        last = run
        if run.missing:
            partial[run.key] = run
    return found, last


def subset_of(text: bytes) -> int | None:
    """The index in :data:`~rflow_jax.data.records.SUBSETS` of the content of a ``subset.txt``; None if unknown."""
    name = text.decode("utf-8", "replace").strip()
    return SUBSETS.index(name) if name in SUBSETS else None


def make_record(key: str, subset: str, members: list[bytes]) -> Record:
    """A record from the contents of its members.

    Raises:
        RecordError: a text is not UTF-8, or an image is empty.
    """
    for member in (GOOD, BAD):
        if not members[member]:
            raise RecordError(f"{key}: {MEMBERS[member]} is empty")
    try:
        prompt, reflection = members[PROMPT].decode(), members[REFLECTION].decode()
    except UnicodeDecodeError as error:
        raise RecordError(f"{key}: a text is not UTF-8 ({error})") from error
    return Record(key, subset, prompt, reflection, members[GOOD], members[BAD])
