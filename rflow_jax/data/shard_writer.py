"""Writes GenRef's shards: tar files of records."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from rflow_jax.data.records import Record
from rflow_jax.utils.atomic_io import write_file


def write_shard(path: Path, records: Iterable[Record]) -> None:
    """Writes a tar file; the same records give the same bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for record in records:
            write_record(tar, record)
    write_file(path, buffer.getvalue())


def write_record(tar: tarfile.TarFile, record: Record) -> None:
    """Adds the five members of a record; readers tell the format of an image by its content, not by this name."""
    members = {
        "bad_image.jpg": record.bad_image,
        "good_image.jpg": record.good_image,
        "prompt.txt": record.prompt.encode(),
        "reflection.txt": record.reflection.encode(),
        "subset.txt": record.subset.encode(),
    }
    for name, content in members.items():
        header = tarfile.TarInfo(f"{record.key}.{name}")
        header.size = len(content)
        tar.addfile(header, io.BytesIO(content))
