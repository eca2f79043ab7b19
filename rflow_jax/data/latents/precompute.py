"""Encodes GenRef once: pictures by the autoencoder, texts by both text encoders."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rflow_jax.data.latents.encoders import Encoded, Encoders, encode, identity_of, load_encoders
from rflow_jax.data.latents.prepare import Job, Prepare, Prepared, ahead
from rflow_jax.data.latents.source import (
    COMPLETE,
    RECORDS_IN_FILE,
    SETTINGS,
    SHARED,
    Entry,
    PrecomputeConfig,
    Settings,
    file_name,
    read_settings,
    require_same,
    settings_text,
)
from rflow_jax.data.open import open_source
from rflow_jax.data.records import SUBSETS, RecordSource
from rflow_jax.data.workers import Workers, worker_count
from rflow_jax.errors import InputError
from rflow_jax.files import write_file
from rflow_jax.parallel.mesh import MeshConfig, make_mesh, put_batch, samples_along
from rflow_jax.parallel.runtime import reproducible
from rflow_jax.progress import count_progress
from rflow_jax.weights.writing import save_tensors, whole

AHEAD = 4  # batches that are decoded in advance


def precompute(config: PrecomputeConfig, *, show: bool = True) -> dict[str, int]:
    """Encodes every record that is not encoded yet; when all are, the folder is whole.

    Args:
        show: draw progress bars.

    Returns:
        Records of each subset.

    Raises:
        InputError: records, model or folder cannot be used.
    """
    out = Path(config.out)
    if (out / COMPLETE).exists():
        raise InputError(f"{out}: all is encoded already; name another folder to encode anew")
    source, mesh, dtype = (
        open_source(config.data),
        make_mesh(MeshConfig(), jax.local_devices()),
        jnp.dtype(config.dtype),
    )
    encoders = load_encoders(config.model, dtype, mesh, progress=show)
    config.data.require_grid(encoders.token_pixels)
    settings = _settings(config, encoders, source)
    _begin(out, settings)
    counts = {name: source.counts.get(name, 0) for name in SUBSETS}
    with count_progress(show) as bar, reproducible(dtype):
        task = bar.add_task("Encoding records", total=sum(counts.values()))
        writer = Writer(config, encoders, settings, mesh)
        writer.write_shared(out / SHARED)
        jobs = [Job(name, index) for name, count in counts.items() for index in range(count)]
        missing = [job for job in jobs if not (out / file_name(*job)).exists()]
        bar.advance(task, len(jobs) - len(missing))
        for done in writer.write(out, missing, Prepare(source, config.data)):
            bar.advance(task, done)
    write_file(out / COMPLETE, json.dumps(counts))
    return counts


class Writer:
    """Encodes batches and writes files of them."""

    def __init__(self, config: PrecomputeConfig, encoders: Encoders, settings: Settings, mesh: Any):
        self._encoders, self._settings, self._mesh = encoders, settings, mesh
        self._dtype, self._workers = jnp.dtype(config.dtype), worker_count(config.data.workers)
        devices = samples_along(mesh)
        self._size = -(-config.batch_size // devices) * devices

    def write_shared(self, path: Path) -> None:
        """What stands for all that is dropped."""
        if path.exists():
            return
        side, small = self._settings.target_size, self._settings.condition_size
        nothing = Prepared(
            Entry("", "", ""), np.zeros((side, side, 3), np.uint8), np.zeros((small, small, 3), np.uint8)
        )
        arrays = jax.device_get(self._start([nothing]))
        black = {"black_mean": arrays.bad[0][0], "black_logvar": arrays.bad[1][0]}
        with whole(path) as file:
            save_tensors(file, black | {"empty_text": arrays.text[0, 0]})

    def write(self, out: Path, jobs: Sequence[Job], prepare: Prepare) -> Iterator[int]:
        """Writes the files of these jobs; yields how many records each holds."""
        with Workers(prepare, self._workers) as workers:
            encoded = self._encoded(ahead(workers, jobs, AHEAD * self._size))
            for name, group in groupby(zip(jobs, encoded, strict=True), lambda pair: file_name(*pair[0])):
                yield _write_file(out / name, [tensors for _, tensors in group])

    def _encoded(self, found: Iterator[Prepared]) -> Iterator[tuple[Entry, dict[str, np.ndarray]]]:
        """Each record with its tensors; while one batch is computed, the one before it is fetched and written."""
        pending: deque[tuple[list[Prepared], Encoded | None]] = deque()
        while batch := list(islice(found, self._size)):
            usable = [one for one in batch if not one.entry.trouble]
            pending.append((batch, self._start(usable) if usable else None))
            if len(pending) > 1:
                yield from _apart(*pending.popleft())
        while pending:
            yield from _apart(*pending.popleft())

    def _start(self, usable: list[Prepared]) -> Encoded:
        # Always as many, so that one program serves all.
        full = [usable[min(i, len(usable) - 1)] for i in range(self._size)]
        tokenizers, length = self._encoders.tokenizers, self._settings.text_length
        texts = [text for one in full for text in one.entry.texts]
        host = (
            np.stack([_there(one.good) for one in full]),
            np.stack([_there(one.bad) for one in full]),
            tokenizers.clip([one.entry.prompt for one in full], self._encoders.clip_length),
            tokenizers.t5(texts, length).reshape(-1, 2, length),
        )
        given = put_batch(self._mesh, host)
        return encode(self._encoders.graphs, self._dtype, self._mesh, self._encoders.weights, *given)


def _settings(config: PrecomputeConfig, encoders: Encoders, source: RecordSource) -> Settings:
    data = config.data
    return Settings(
        config.model,
        identity_of(encoders),
        data.target_size,
        data.condition_size,
        data.crop,
        config.max_sequence_length or encoders.default_t5_length,
        config.dtype,
        source.fingerprint,
    )


def _begin(out: Path, settings: Settings) -> None:
    """Makes the folder, or makes sure that what it holds was made alike."""
    if (out / SETTINGS).exists():
        wanted = vars(settings)
        require_same(out, read_settings(out), {name: wanted[name] for name in wanted if name != "model"})
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: holds other files; name an empty folder")
    else:
        write_file(out / SETTINGS, settings_text(settings))


def _apart(batch: list[Prepared], encoded: Encoded | None) -> Iterator[tuple[Entry, dict[str, np.ndarray]]]:
    arrays, row = jax.device_get(encoded), 0
    for one in batch:
        if one.entry.trouble or arrays is None:
            yield one.entry, {}
            continue
        tensors = {
            "good_mean": arrays.good[0][row],
            "good_logvar": arrays.good[1][row],
            "bad_mean": arrays.bad[0][row],
            "bad_logvar": arrays.bad[1][row],
            "pooled": arrays.pooled[row],
            "text": arrays.text[row, 1],
        }
        yield one.entry, tensors | ({"text_with_reflection": arrays.text[row, 0]} if one.entry.has_reflection else {})
        row += 1


def _write_file(path: Path, records: list[tuple[Entry, dict[str, np.ndarray]]]) -> int:
    assert len(records) <= RECORDS_IN_FILE
    tensors = {f"{i}.{name}": tensor for i, (_, found) in enumerate(records) for name, tensor in found.items()}
    with whole(path) as file:
        save_tensors(file, tensors, {"entries": json.dumps([list(entry) for entry, _ in records])})
    return len(records)


def _there(pixels: np.ndarray | None) -> np.ndarray:
    assert pixels is not None
    return pixels
