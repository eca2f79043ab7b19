"""Where the shards lie: patterns of local files and of addresses, expanded and looked up."""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rflow_jax.data.storage.http import http_range, probe_http
from rflow_jax.data.storage.object_store import Store, store_range
from rflow_jax.data.storage.retry import RetryPolicy, TransientError, is_http, public, with_retries
from rflow_jax.errors import InputError

PIPE = "pipe:"
_LOOKUPS = 16  # at once


@dataclass(frozen=True)
class Shard:
    """One tar file.

    Attributes:
        url: an absolute path, an address, or ``pipe:`` and a shell command.
        size: in bytes; None where it is not known before all is read.
        version: changes when the file does (its time or tag), as far as its store can tell.
    """

    url: str
    size: int | None
    version: str

    @property
    def is_local(self) -> bool:
        """Whether it is a file of this machine."""
        return "://" not in self.url and not self.is_pipe

    @property
    def is_pipe(self) -> bool:
        """Whether it is what a shell command writes."""
        return self.url.startswith(PIPE)

    @property
    def name(self) -> str:
        """The same wherever it lies: the last part of its path, or the command."""
        return self.url if self.is_pipe else public(self.url).rpartition("/")[2]

    @property
    def shown(self) -> str:
        """For messages: without passwords and signatures."""
        return public(self.url)


def expand(
    patterns: str | Sequence[str], *, allow_shell: bool = False, patience: RetryPolicy = RetryPolicy()
) -> list[Shard]:
    """The shards that patterns name, in their order (matches of ``*`` sorted); one that is named twice counts once.

    Args:
        patterns: files and folders (their ``*.tar``), ``hf://datasets/owner/name/*.tar``, http(s) addresses, and
            ``gs://``, ``s3://`` or whatever else fsspec knows; ``{000..208}`` and ``{a,b}`` stand for several,
            ``*``, ``?`` and ``[ab]`` match (not over HTTP). ``pipe:COMMAND`` is what a shell command writes.
        allow_shell: permits ``pipe:``.

    Raises:
        InputError: a pattern that matches nothing, cannot be looked up or is not permitted.
    """
    names = [name for pattern in ([patterns] if isinstance(patterns, str) else patterns) for name in _braces(pattern)]
    if not names:
        raise InputError("no shards: name at least one file or pattern, such as folder/*.tar")
    for name in names:
        _permit(name, allow_shell)
    # One of each kind for all threads, so that each folder is listed once.
    stores = {name.partition("://")[0]: name for name in names if _in_store(name)}
    stores = {scheme: Store(name) for scheme, name in stores.items()}
    with ThreadPoolExecutor(_LOOKUPS) as pool:
        found = pool.map(partial(_find, stores=stores, patience=patience), names)
        # By address: a store may word the version of a file in one way in a listing and in another alone.
        return list({shard.url: shard for shards in found for shard in shards}.values())


def _braces(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        # A backslash is part of a command, not an escape.
        return list(braceexpand(pattern, escape=not pattern.startswith(PIPE)))
    except ValueError as error:
        raise InputError(f"{pattern}: braces do not match; a range is written {{000..208}}") from error


def _permit(name: str, allow_shell: bool) -> None:
    if name.startswith(PIPE) and not allow_shell:
        raise InputError(f"{name}: runs a shell command; set allow_shell to true if it may")
    if name.startswith(("http://", "https://")) and "*" in name:
        raise InputError(f"{public(name)}: no folder can be listed over HTTP; name the files with {{000..208}}")


def _in_store(name: str) -> bool:
    return "://" in name and not name.startswith(("http://", "https://", "file://", PIPE))


def _find(name: str, stores: dict[str, Store], patience: RetryPolicy) -> list[Shard]:
    if name.startswith(PIPE):
        return [Shard(name, None, "")]
    if _in_store(name):
        found = stores[name.partition("://")[0]].find(name, patience)
        return [Shard(*one) for one in found]
    if is_http(name):
        probe = probe_http(name, patience)
        return [Shard(name, probe.size, probe.version)]
    return _find_local(name)


def _find_local(name: str) -> list[Shard]:
    path = Path(name.removeprefix("file://")).expanduser()
    pattern = str(path / "*.tar") if path.is_dir() else str(path)
    # A name that exists is taken as it is, whatever letters are in it.
    paths = [pattern] if path.is_file() else sorted(glob.glob(pattern, recursive=True))
    files = [os.path.abspath(p) for p in paths if os.path.isfile(p)]
    if not files:
        raise InputError(f"{pattern}: no shard matches")
    stats = [os.stat(file) for file in files]
    return [Shard(file, s.st_size, str(s.st_mtime_ns)) for file, s in zip(files, stats, strict=True)]


_SMALL_BLOCK, _LARGE_BLOCK = 1 << 14, 1 << 20


def read_range(shard: Shard, start: int, length: int, patience: RetryPolicy = RetryPolicy()) -> bytes:
    """Exactly the ``length`` bytes from ``start``; threads and processes may call it at once.

    Raises:
        InputError: the shard is gone, has another size than when it was looked up, or does not answer; or its
            server ignores ranges; or it is a ``pipe:``.
    """
    if length <= 0:
        return b""
    if shard.is_pipe:
        raise InputError(f"{shard.shown}: no byte ranges can be read from a pipe; stream it")
    if is_http(shard.url):
        return http_range(shard.url, start, length, shard.size, patience)
    if not shard.is_local:
        return store_range(shard.url, start, length, patience)
    return with_retries(lambda: _local_range(shard, start, length), shard.url, patience)


def _local_range(shard: Shard, start: int, length: int) -> bytes:
    try:
        # Opened each time: it costs little beside the reading, and no open file is carried into other processes.
        fd = os.open(shard.url, os.O_RDONLY)
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(f"{shard.url}: cannot be read ({error.strerror})") from error
    except OSError as error:  # a network disk that is away for a moment
        raise TransientError(str(error)) from error
    try:
        size = os.fstat(fd).st_size
        if shard.size not in (None, size):
            raise InputError(f"{shard.url}: {size} bytes, {shard.size} when it was looked up; start again to index it")
        return _pread(fd, start, length)
    except OSError as error:
        raise TransientError(str(error)) from error
    finally:
        os.close(fd)


def _pread(fd: int, start: int, length: int) -> bytes:
    pieces = []
    while length > 0:  # one call returns 2 GiB at most
        piece = os.pread(fd, length, start)
        if not piece:
            raise TransientError(f"ends at byte {start}")
        pieces.append(piece)
        start, length = start + len(piece), length - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class RangeFile(io.RawIOBase):
    """A remote shard as a seekable file, fetched in blocks.

    A block is small after a jump, so that hopping from header to header fetches little else, and grows as long as
    reading goes on without one, so that small members don't cost a request each.
    """

    def __init__(self, shard: Shard, patience: RetryPolicy = RetryPolicy()):
        super().__init__()
        if shard.size is None:
            raise InputError(f"{shard.shown}: its server does not say its size; download the shards or stream them")
        self._shard, self._size, self._patience = shard, shard.size, patience
        self._at, self._block, self._block_start = 0, b"", 0
        self._ahead = _SMALL_BLOCK

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = self._size if size is None or size < 0 else min(self._size, self._at + size)
        pieces = []
        while self._at < end:
            if not 0 <= self._at - self._block_start < len(self._block):
                self._fetch(end)
            inside = self._at - self._block_start
            pieces.append(self._block[inside : inside + end - self._at])
            self._at += len(pieces[-1])
        return b"".join(pieces)

    def _fetch(self, end: int) -> None:
        goes_on = self._at == self._block_start + len(self._block)
        self._ahead = min(2 * self._ahead, _LARGE_BLOCK) if goes_on else _SMALL_BLOCK
        length = min(max(self._ahead, end - self._at), self._size - self._at)
        self._block = read_range(self._shard, self._at, length, self._patience)
        self._block_start = self._at
