"""The index of one shard, and the cache of indexes: a file for each shard."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import struct
import threading
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from rflow_jax.data.records import SUBSETS
from rflow_jax.data.sources.tar_members import LARGEST, MEMBERS
from rflow_jax.data.storage.shards import Shard
from rflow_jax.errors import InputError
from rflow_jax.utils.atomic_io import write_file
from rflow_jax.utils.files import OF_THE_MACHINE, open_regular
from rflow_jax.utils.json_files import parse_json
from rflow_jax.utils.output_folder import try_lock

# Of a cached index. In the first, members that lie apart were missing.
_FORMATS = (2, 1)
_LOOK_AGAIN = 0.2  # seconds
_NO_INDEX = (
    *(OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, SyntaxError, tokenize.TokenError),  # NumPy's headers are Python
)
_LARGEST_INDEX = 2**32  # bytes; a sample has about 130
log = logging.getLogger(__name__)


@dataclass
class Troubles:
    """The unusable parts of a shard.

    Attributes:
        samples: the number of unusable samples.
        named: the first of them, and why.
        damage: why the shard cannot be read to its end; empty if it can.
    """

    samples: int = 0
    named: list[str] = field(default_factory=list)
    damage: str = ""


@dataclass(frozen=True)
class ShardIndex:
    """The n samples of one shard.

    Attributes:
        keys: their names, concatenated in UTF-8.
        key_ends: [n] int64; the end of each in ``keys``.
        offsets: [n, 5] int64; the first byte of each member, in the order of ``MEMBERS``.
        sizes: [n, 5] int64; bytes of each member.
        subsets: [n] uint8; indexes in ``SUBSETS``.
        troubles: what was left out.
    """

    keys: np.ndarray
    key_ends: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    subsets: np.ndarray
    troubles: Troubles

    def __len__(self) -> int:
        return len(self.subsets)

    def key(self, row: int) -> str:
        """The name of one sample."""
        start = int(self.key_ends[row - 1]) if row else 0
        return self.keys[start : int(self.key_ends[row])].tobytes().decode("utf-8", "replace")


def _file(shard: Shard, cache: Path, format: int) -> Path:
    identity = json.dumps([format, shard.url, shard.size, shard.version])
    return cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"


@contextmanager
def claimed(shard: Shard, cache: Path, ended: threading.Event) -> Iterator[None]:
    """While this lasts, no other process with the same cache is at the shard; without locks there is no such promise.

    Raises:
        CancelledError: ``ended`` was set while another process was at it.
    """
    path = _file(shard, cache, _FORMATS[0]).with_suffix(".lock")
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while (held := try_lock(path)) is None and not ended.wait(_LOOK_AGAIN):
                pass
        except (OSError, InputError):  # a cache that cannot be written to, or a disk without locks
            held = None
        if held is not None:
            stack.enter_context(held)
            stack.callback(path.unlink, missing_ok=True)
        elif ended.is_set():
            raise CancelledError
        yield


def load_index(shard: Shard, cache: Path) -> ShardIndex | None:
    """A shard's index from the cache, or None; one of the first format only if it has all samples."""
    for format in _FORMATS:
        found = _load(_file(shard, cache, format), shard)
        if found is not None and (format == _FORMATS[0] or not found.troubles.samples):
            return found
    return None


def _load(file: Path, shard: Shard) -> ShardIndex | None:
    if not file.exists():
        return None
    try:
        with open_regular(file, "index", _LARGEST_INDEX) as content:
            with zipfile.ZipFile(content) as archive:  # which may unpack to any size
                if sum(member.file_size for member in archive.infolist()) > _LARGEST_INDEX:
                    raise InputError(f"more than {_LARGEST_INDEX:,} bytes when unpacked")
            content.seek(0)
            with np.load(content, allow_pickle=False) as arrays:
                troubles = Troubles(**parse_json(arrays["troubles"].tobytes(), "troubles"))
                named = {name: arrays[name] for name in arrays.files if name != "troubles"}
        index = ShardIndex(**named, troubles=troubles)
        _require_fit(index, shard)
        return index
    except _NO_INDEX as error:
        if getattr(error, "errno", None) in OF_THE_MACHINE:
            raise
        log.warning("%s: damaged, so the shard is indexed again (%s)", file, error)
        return None


def _require_fit(index: ShardIndex, shard: Shard) -> None:
    """Raises ValueError for arrays that are not an index of this shard."""
    rows, troubles = len(index.subsets), index.troubles
    shapes = index.key_ends.shape, index.offsets.shape, index.sizes.shape, index.subsets.shape
    if shapes != ((rows,), (rows, len(MEMBERS)), (rows, len(MEMBERS)), (rows,)) or index.keys.ndim != 1:
        raise ValueError("arrays of other shapes")
    if not all(array.dtype == np.int64 for array in (index.key_ends, index.offsets, index.sizes)):
        raise ValueError("arrays of other types")
    if index.keys.dtype != np.uint8 or index.subsets.dtype != np.uint8:
        raise ValueError("arrays of other types")
    kinds = type(troubles.samples), type(troubles.named), type(troubles.damage)
    if kinds != (int, list, str) or not all(isinstance(one, str) for one in troubles.named):
        raise ValueError("troubles of other types")
    if not rows:
        return
    largest = np.asarray(LARGEST)
    fits = index.offsets.min() >= 0 and index.sizes.min() >= 0 and (index.sizes <= largest).all()
    fits = fits and (shard.size is None or (index.offsets <= shard.size - index.sizes).all())
    ends = np.diff(index.key_ends, prepend=0)
    if not (fits and index.subsets.max() < len(SUBSETS) and ends.min() >= 0 and index.key_ends[-1] == len(index.keys)):
        raise ValueError("numbers that do not fit the shard")


def save_index(index: ShardIndex, shard: Shard, cache: Path) -> None:
    """Keeps a shard's index in the cache, or warns that it cannot be kept."""
    file = _file(shard, cache, _FORMATS[0])
    arrays = {name: value for name, value in vars(index).items() if name != "troubles"}
    arrays["troubles"] = np.frombuffer(json.dumps(asdict(index.troubles)).encode(), np.uint8)
    content = io.BytesIO()
    np.savez(content, **arrays)
    try:
        write_file(file, content.getvalue())
    except OSError as error:  # a full or read-only disk only costs time at the next start
        log.warning("%s: the index is not kept (%s)", file, error)
