"""Tiny shards of GenRef, whose every byte follows from the sample's name."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

from PIL import Image

from rflow_jax.data.records import SUBSETS, Record

NAMES = ("bad_image.jpg", "good_image.jpg", "prompt.txt", "reflection.txt", "subset.txt")


@cache
def picture(name: str, format: str = "JPEG") -> bytes:
    """An encoded picture of 8 x 8 pixels."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", (8, 8), hashlib.shake_256(name.encode()).digest(192)).save(buffer, format)
    return buffer.getvalue()


def members(key: str, subset: str) -> dict[str, bytes]:
    """What a sample consists of."""
    return {
        "bad_image.jpg": picture(f"bad {key}"),
        "good_image.jpg": picture(f"good {key}"),
        "prompt.txt": f"prompt of {key}".encode(),
        "reflection.txt": f"make {key} bétter".encode(),
        "subset.txt": subset.encode(),
    }


def record(key: str, subset: str) -> Record:
    """The record that such a sample is read as."""
    files = members(key, subset)
    texts = (files["prompt.txt"].decode(), files["reflection.txt"].decode())
    return Record(key, subset, *texts, files["good_image.jpg"], files["bad_image.jpg"])


def tar_bytes(files: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of these files, in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in files:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


def shard_bytes(keys: Mapping[str, str], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A shard of samples: key -> subset."""
    return tar_bytes(flat(keys), format)


def flat(keys: Mapping[str, str]) -> list[tuple[str, bytes]]:
    """The files of samples, in the order in which a shard holds them."""
    return [(f"{key}.{name}", file) for key, subset in keys.items() for name, file in members(key, subset).items()]


def keys_of(shard: int, count: int, subsets: Sequence[str] = SUBSETS) -> dict[str, str]:
    """Keys of one shard, the subsets in turn."""
    return {f"{shard:03d}_{i:04d}": subsets[i % len(subsets)] for i in range(count)}


def write_shards(folder: Path, shards: int = 2, count: int = 8, subsets: Sequence[str] = SUBSETS) -> list[Path]:
    """``000.tar``, ``001.tar``, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{shard:03d}.tar" for shard in range(shards)]
    for shard, path in enumerate(paths):
        path.write_bytes(shard_bytes(keys_of(shard, count, subsets)))
    return paths
