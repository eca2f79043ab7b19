"""Byte ranges of shards, wherever they lie."""

from __future__ import annotations

import io
import os

from rflow_jax.data.storage.http import http_range
from rflow_jax.data.storage.patience import Patience, Trouble, is_http, patiently
from rflow_jax.data.storage.shards import Shard
from rflow_jax.data.storage.stores import store_range
from rflow_jax.errors import InputError

_SMALL_BLOCK, _LARGE_BLOCK = 1 << 14, 1 << 20


def read_range(shard: Shard, start: int, length: int, patience: Patience = Patience()) -> bytes:
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
    return patiently(lambda: _local_range(shard, start, length), shard.url, patience)


def _local_range(shard: Shard, start: int, length: int) -> bytes:
    try:
        # Opened each time: it costs little beside the reading, and no open file is carried into other processes.
        fd = os.open(shard.url, os.O_RDONLY)
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(f"{shard.url}: cannot be read ({error.strerror})") from error
    except OSError as error:  # a network disk that is away for a moment
        raise Trouble(str(error)) from error
    try:
        size = os.fstat(fd).st_size
        if shard.size not in (None, size):
            raise InputError(f"{shard.url}: {size} bytes, {shard.size} when it was looked up; start again to index it")
        return _pread(fd, start, length)
    except OSError as error:
        raise Trouble(str(error)) from error
    finally:
        os.close(fd)


def _pread(fd: int, start: int, length: int) -> bytes:
    pieces = []
    while length > 0:  # one call returns 2 GiB at most
        piece = os.pread(fd, length, start)
        if not piece:
            raise Trouble(f"ends at byte {start}")
        pieces.append(piece)
        start, length = start + len(piece), length - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class RangeFile(io.RawIOBase):
    """A remote shard as a seekable file, fetched in blocks.

    A block is small after a jump, so that hopping from header to header fetches little else, and grows as long as
    reading goes on without one, so that small members don't cost a request each.
    """

    def __init__(self, shard: Shard, patience: Patience = Patience()):
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
