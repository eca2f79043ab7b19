"""Shards by their addresses: which there are, what they begin with, and byte ranges of them, wherever they lie."""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rflow_jax.data.storage.http import http_range, probe_http
from rflow_jax.data.storage.retry import SLOWEST, RetryPolicy, TransientError, is_http, public, with_retries
from rflow_jax.errors import InputError
from rflow_jax.utils.network import printable
from rflow_jax.utils.secrets import public_addresses

_MAGIC = frozenset("*?[")
# Names that stores use for the tag that changes with a file's content, best first.
_VERSION_KEYS = ("blob_id", "ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "updated", "created")


class StoredFile(NamedTuple):
    """A file of a store; ``size`` in bytes, None if the store does not say."""

    url: str
    size: int | None
    version: str


class Store:
    """Looks up files in the fsspec file system of an address; threads may share it.

    Raises:
        InputError: its package is not installed, or fsspec does not know the scheme.
    """

    def __init__(self, url: str):
        self._fs = _open(url)[0]

    def find(self, url: str, retry: RetryPolicy) -> list[StoredFile]:
        """The files that an address matches, sorted; it may contain ``*``, ``?`` and ``[ab]``.

        Raises:
            InputError: there are none, or the store does not answer.
        """
        path = self._fs._strip_protocol(url)

        def look() -> dict[str, Any]:
            try:
                return self._fs.glob(path, detail=True) if _MAGIC & set(path) else {path: self._fs.info(path)}
            except FileNotFoundError:
                return {}
            except PermissionError as error:
                raise InputError(f"{public(url)}: access is refused ({_line(error)})") from error
            except Exception as error:  # each store has errors of its own, without a common base
                raise TransientError(_line(error)) from error

        infos = {path: info for path, info in with_retries(look, url, retry).items() if info["type"] != "directory"}
        if not infos:
            raise InputError(f"{public(url)}: no shard matches")
        scheme = url.partition("://")[0]
        return [
            StoredFile(f"{scheme}://{path}", info.get("size"), _version(info)) for path, info in sorted(infos.items())
        ]


def store_range(url: str, start: int, length: int, retry: RetryPolicy) -> bytes:
    """Exactly the ``length`` bytes from ``start``.

    Raises:
        InputError: there is no such file, or no answer.
    """
    from fsspec.asyn import AsyncFileSystem, sync

    def attempt() -> bytes:
        # Looked up at each call: fsspec keeps one for each thread and process, and its event loop is not inherited.
        fs, path = _open(url)
        try:
            if isinstance(fs, AsyncFileSystem):
                limit = retry.timeout + length / SLOWEST
                data = sync(fs.loop, fs._cat_file, path, start=start, end=start + length, timeout=limit)
            else:
                data = fs.cat_file(path, start=start, end=start + length)
        except (FileNotFoundError, PermissionError) as error:
            raise InputError(f"{public(url)}: {_line(error)}") from error
        except Exception as error:  # as above
            raise TransientError(_line(error)) from error
        if data is None or len(data) != length:
            raise TransientError(f"{len(data or b'')} bytes came instead of {length}")
        return bytes(data)

    return with_retries(attempt, url, retry)


def _open(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"{public(url)}: {_line(error)}") from error


def _version(info: dict[str, Any]) -> str:
    return next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")


def _line(error: Exception) -> str:
    return public_addresses(printable(str(error))) or type(error).__name__


PIPE = "pipe:"
_LOOKUPS = 16  # at once


@dataclass(frozen=True)
class Shard:
    """One tar file.

    Attributes:
        url: an absolute path, an address, or ``pipe:`` and a shell command.
        size: in bytes; None where it is unknown until the whole file is read.
        version: changes when the file does (its time or tag), as far as its store can tell.
    """

    url: str
    size: int | None
    version: str

    @property
    def is_local(self) -> bool:
        return "://" not in self.url and not self.is_pipe

    @property
    def is_pipe(self) -> bool:
        """Whether it is the output of a shell command."""
        return self.url.startswith(PIPE)

    @property
    def name(self) -> str:
        """The last part of its path, or the command: independent of its location."""
        return self.url if self.is_pipe else public(self.url).rpartition("/")[2]

    @property
    def shown(self) -> str:
        """The address for messages, without passwords and signatures."""
        return public(self.url)


def expand(
    patterns: str | Sequence[str], *, allow_shell: bool = False, retry: RetryPolicy = RetryPolicy()
) -> list[Shard]:
    """The shards that patterns match, in their order (matches of ``*`` sorted), without duplicates.

    Args:
        patterns: files and folders (their ``*.tar``), ``hf://datasets/owner/name/*.tar``, http(s) addresses, and
            ``gs://``, ``s3://`` or whatever else fsspec supports; ``{000..208}`` and ``{a,b}`` stand for several,
            ``*``, ``?`` and ``[ab]`` match (not over HTTP). ``pipe:COMMAND`` is the output of a shell command.
        allow_shell: permits ``pipe:``.

    Raises:
        InputError: a pattern matches nothing, cannot be looked up or is not permitted.
    """
    names = [name for pattern in ([patterns] if isinstance(patterns, str) else patterns) for name in _braces(pattern)]
    if not names:
        raise InputError("no shards: name at least one file or pattern, such as folder/*.tar")
    for name in names:
        if name.startswith(PIPE) and not allow_shell:
            raise InputError(f"{public(name)}: runs a shell command; set allow_shell to true if it may")
        if name.startswith(("http://", "https://")) and "*" in name:
            raise InputError(f"{public(name)}: no folder can be listed over HTTP; name the files with {{000..208}}")
    # One store of each kind for all threads, so that each folder is listed once.
    stores = {name.partition("://")[0]: name for name in names if _in_store(name)}
    stores = {scheme: Store(name) for scheme, name in stores.items()}
    with ThreadPoolExecutor(_LOOKUPS) as pool:
        found = pool.map(partial(_find, stores=stores, retry=retry), names)
        # Keyed by address: a store may format a file's version differently in a listing and in a single lookup.
        return list({shard.url: shard for shards in found for shard in shards}.values())


def _braces(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        # A backslash is part of a command, not an escape.
        return list(braceexpand(pattern, escape=not pattern.startswith(PIPE)))
    except ValueError as error:
        raise InputError(f"{public(pattern)}: braces do not match; a range is written {{000..208}}") from error


def _in_store(name: str) -> bool:
    return "://" in name and not name.startswith(("http://", "https://", "file://", PIPE))


def _find(name: str, stores: dict[str, Store], retry: RetryPolicy) -> list[Shard]:
    if name.startswith(PIPE):
        return [Shard(name, None, "")]
    if _in_store(name):
        return [Shard(*found) for found in stores[name.partition("://")[0]].find(name, retry)]
    if is_http(name):
        probe = probe_http(name, retry)
        return [Shard(name, probe.size, probe.version)]
    path = Path(name.removeprefix("file://")).expanduser()
    pattern = str(path / "*.tar") if path.is_dir() else str(path)
    # An existing name is taken literally, even with ``*`` or brackets in it.
    paths = [pattern] if path.is_file() else sorted(glob.glob(pattern, recursive=True))
    files = [os.path.abspath(p) for p in paths if os.path.isfile(p)]
    if not files:
        raise InputError(f"{pattern}: no shard matches")
    stats = [os.stat(file) for file in files]
    return [Shard(file, s.st_size, str(s.st_mtime_ns)) for file, s in zip(files, stats, strict=True)]


_SMALL_BLOCK, LARGE_BLOCK = 1 << 14, 1 << 24
_GROWTH = 4
# About what arrives in the time of another request: so much is read and left aside rather than jumped over.
_READ_THROUGH = 1 << 22


def read_range(shard: Shard, start: int, length: int, retry: RetryPolicy = RetryPolicy()) -> bytes:
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
        return http_range(shard.url, start, length, shard.size, retry)
    if not shard.is_local:
        return store_range(shard.url, start, length, retry)
    return with_retries(lambda: _local_range(shard, start, length), shard.url, retry)


def _local_range(shard: Shard, start: int, length: int) -> bytes:
    try:
        # Opened each time: it costs little compared to reading, and no open file is carried into other processes.
        fd = os.open(shard.url, os.O_RDONLY)
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(f"{shard.url}: cannot be read ({error.strerror})") from error
    except OSError as error:  # a network disk that is briefly unavailable
        raise TransientError(str(error)) from error
    try:
        size = os.fstat(fd).st_size
        if shard.size not in (None, size):
            raise InputError(f"{shard.url}: {size} bytes, {shard.size} when it was looked up; start again to index it")
        pieces = []
        while length > 0:  # one call returns 2 GiB at most
            piece = os.pread(fd, length, start)
            if not piece:
                raise TransientError(f"ends at byte {start}")
            pieces.append(piece)
            start, length = start + len(piece), length - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
    except OSError as error:
        raise TransientError(str(error)) from error
    finally:
        os.close(fd)


class RangeFile(io.RawIOBase):
    """A remote shard as a seekable file, fetched in blocks.

    A block is small after a long jump, so that a jump between headers fetches little else. Blocks grow to 16 MiB while
    reads follow each other closely, so that members of a few MiB and less don't cost a request each.
    """

    def __init__(self, shard: Shard, retry: RetryPolicy = RetryPolicy()):
        super().__init__()
        if shard.size is None:
            raise InputError(f"{shard.shown}: its server does not report its size; download the shards or stream them")
        self._shard, self._size, self._retry = shard, shard.size, retry
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
                near = 0 <= self._at - (self._block_start + len(self._block)) <= _READ_THROUGH
                self._ahead = min(_GROWTH * self._ahead, LARGE_BLOCK) if near else _SMALL_BLOCK
                length = min(max(self._ahead, end - self._at), self._size - self._at)
                self._block = read_range(self._shard, self._at, length, self._retry)
                self._block_start = self._at
            inside = self._at - self._block_start
            pieces.append(self._block[inside : inside + end - self._at])
            self._at += len(pieces[-1])
        return b"".join(pieces)
