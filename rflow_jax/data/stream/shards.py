"""One shard read from its beginning to its end, wherever it comes from: for what has no byte ranges."""

from __future__ import annotations

import lzma
import os
import selectors
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, closing
from tarfile import TarError
from typing import Any, NamedTuple

from rflow_jax.data.records import SUBSETS
from rflow_jax.data.storage.http import http_get
from rflow_jax.data.storage.patience import Patience, Trouble, is_http, patiently
from rflow_jax.data.storage.ranges import RangeFile
from rflow_jax.data.storage.shards import PIPE, Shard
from rflow_jax.data.tar.members import SUBSET, DamagedTar, Sample, headers, open_tar, samples, subset_of
from rflow_jax.errors import InputError

_BLOCK = 1 << 20
_DAMAGE = (TarError, EOFError, OSError, zlib.error, lzma.LZMAError)


class Raw(NamedTuple):
    """A sample as it was read.

    Attributes:
        members: contents, in the order of ``MEMBERS``; empty if it cannot be used.
        trouble: why it cannot be used; empty if it can.
    """

    key: str
    subset: str
    members: list[bytes]
    trouble: str = ""


def read_shard(shard: Shard, patience: Patience) -> Iterator[Raw]:
    """The samples of a shard.

    After a broken connection it is read from its beginning again, and what came before is passed over. What makes the
    rest of it unreadable is its last sample, one with a trouble and without a key: damage, or no answer.
    """
    reader: Iterator[Raw] | None = None
    done = 0

    def following() -> Raw | None:
        nonlocal reader
        if reader is None:
            reader = _read_once(shard, patience, done)
        try:
            return next(reader, None)
        except Trouble:
            reader = None
            raise

    try:
        while (raw := patiently(following, shard.url, patience)) is not None:
            yield raw
            done += 1
    except InputError as error:
        yield Raw("", "", [], str(error))
    finally:
        if reader is not None:
            reader.close()  # pyright: ignore[reportAttributeAccessIssue]


def _read_once(shard: Shard, patience: Patience, skip: int) -> Iterator[Raw]:
    damage: list[str] = []
    with ExitStack() as stack:
        file = _open(shard, patience, stack)
        number = 0
        for sample in samples(_members(file, damage)):
            if damage and "has no" in sample.trouble:  # the one at the cut is the damage
                break
            number += 1
            if number > skip:
                yield _raw(sample)
    if damage and number >= skip:
        yield Raw("", "", [], f"{shard.shown}: {damage[0]}; {number} samples before it")


def _members(file: Any, damage: list[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each member, up to where the tar is damaged."""
    try:
        with closing(open_tar(file, stream=True)) as tar:
            for header in headers(tar):
                opened = tar.extractfile(header)
                content = b"" if opened is None else opened.read()
                if len(content) != header.size:
                    raise DamagedTar(f"cut in {header.name}")
                yield header.name, content
    except (DamagedTar, *_DAMAGE) as error:
        damage.append(str(error) or type(error).__name__)


def _raw(sample: Sample[bytes]) -> Raw:
    named = sample.found[SUBSET]
    subset = None if named is None else subset_of(named)
    if sample.trouble or subset is None:
        return Raw(sample.key, "", [], sample.trouble or "has an unknown subset")
    return Raw(sample.key, SUBSETS[subset], [content or b"" for content in sample.found])


def _open(shard: Shard, patience: Patience, stack: ExitStack) -> Any:
    """Something to read from; what must be closed again goes onto the stack.

    Raises:
        Trouble: another attempt may help.
        InputError: none will.
    """
    if shard.is_pipe:
        return _Pipe(shard, patience, stack)
    if is_http(shard.url):
        response, chunks = stack.enter_context(http_get(shard.url, {}, patience))
        if response.status_code != 200:
            raise Trouble(f"status {response.status_code}")
        return _Chunks(chunks)
    if not shard.is_local:
        return RangeFile(shard, patience)
    try:
        return stack.enter_context(open(shard.url, "rb", buffering=_BLOCK))
    except OSError as error:
        raise InputError(f"{shard.url}: cannot be read ({error.strerror})") from error


class _Chunks:
    """Pieces of any size as a file."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks, self._rest, self._at = chunks, b"", 0

    def read(self, size: int) -> bytes:
        pieces, wanted = [], size
        while wanted:
            if self._at == len(self._rest):
                self._rest, self._at = next(self._chunks, b""), 0
                if not self._rest:
                    break
            pieces.append(self._rest[self._at : self._at + wanted])
            self._at += len(pieces[-1])
            wanted -= len(pieces[-1])
        return b"".join(pieces)


class _Pipe:
    """What a shell command writes. It is ended when it is silent for too long, and when it is not read to its end."""

    def __init__(self, shard: Shard, patience: Patience, stack: ExitStack):
        self._shard, self._patience = shard, patience
        command = shard.url.removeprefix(PIPE)
        # A session of its own, so that all that the shell has started ends with it.
        self._process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True)
        stack.callback(self._end)
        assert self._process.stdout is not None
        self._fd = self._process.stdout.fileno()
        self._ready = stack.enter_context(selectors.DefaultSelector())
        self._ready.register(self._fd, selectors.EVENT_READ)
        self._chunks = _Chunks(iter(self._read_some, b""))

    def read(self, size: int) -> bytes:
        return self._chunks.read(size)

    def _read_some(self) -> bytes:
        if not self._ready.select(self._patience.timeout):
            raise Trouble(f"no byte for {self._patience.timeout:g} s")
        data = os.read(self._fd, _BLOCK)
        if not data and (status := self._status()):
            raise Trouble(f"the command ended with status {status}")
        return data

    def _status(self) -> int:
        try:
            return self._process.wait(self._patience.timeout)
        except subprocess.TimeoutExpired as error:
            raise Trouble("the command does not end") from error

    def _end(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
