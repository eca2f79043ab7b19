"""Encodes records once: the networks that run before the transformer, and the folder of their outputs."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax.sharding import Mesh, PartitionSpec

from rflow_jax.data.records import SUBSETS
from rflow_jax.data.sources.latents import (
    COMPLETE,
    RECORDS_IN_FILE,
    SETTINGS,
    SHARED,
    LatentEntry,
    LatentMetadata,
    PrecomputeConfig,
    file_name,
    read_settings,
    require_same,
    settings_text,
)
from rflow_jax.data.sources.open import open_source
from rflow_jax.data.workers import Workers, worker_count
from rflow_jax.errors import InputError, RunError
from rflow_jax.flow import PATCH
from rflow_jax.generation.sampling import to_network_range
from rflow_jax.models.autoencoder import AutoencoderConfig
from rflow_jax.parallel.mesh import BATCH, MeshConfig, make_mesh, put_batch, samples_along
from rflow_jax.parallel.runtime import reproducible
from rflow_jax.parallel.sharding import sharding_for
from rflow_jax.precompute.prepare import Job, Prepare, Prepared, ahead
from rflow_jax.tokenizers.flux import Tokenizers
from rflow_jax.typing import Array, Float, Int, UInt8
from rflow_jax.utils.atomic_io import write_file
from rflow_jax.utils.output_folder import LOCK, Claim, usable_folder
from rflow_jax.utils.progress import byte_progress, count_progress
from rflow_jax.weights.components import CLIP, T5, TRANSFORMER, VAE
from rflow_jax.weights.defaults import SamplingDefaults
from rflow_jax.weights.finite import all_finite
from rflow_jax.weights.flux import FluxModel, StoredNetwork, defaults_of, describe
from rflow_jax.weights.hub import resolve
from rflow_jax.weights.saving import atomic_output, save_tensors

NETWORKS = {"vae": VAE, "clip": CLIP, "t5": T5}


class Graphs(NamedTuple):
    """The networks without their weights."""

    vae: nnx.GraphDef
    clip: nnx.GraphDef
    t5: nnx.GraphDef


@dataclass(frozen=True)
class Encoders:
    """The networks that run before the transformer, named as in ``FluxModel``."""

    graphs: Graphs
    weights: dict[str, Any]
    tokenizers: Tokenizers
    vae_config: AutoencoderConfig
    clip_length: int
    defaults: SamplingDefaults

    @property
    def token_pixels(self) -> int:
        """Pixels a side of one image token."""
        return self.vae_config.factor * PATCH


class Encoded(NamedTuple):
    """A batch after the encoders: posteriors as (mean, log variance), and two texts for each sample."""

    good: tuple[Float[Array, "b y x z"], Float[Array, "b y x z"]]
    bad: tuple[Float[Array, "b v w z"], Float[Array, "b v w z"]]
    pooled: Float[Array, "b p"]
    text: Float[Array, "b 2 t e"]


def load_encoders(model: str, dtype: Dtype, mesh: Mesh, *, progress: bool = True) -> Encoders:
    """Loads the encoders of a model; raises InputError if it cannot be found or used."""
    root = resolve(model)
    found = describe(root)
    paths = found.components
    if missing := [component.folder for component in NETWORKS.values() if component.folder not in paths]:
        raise InputError(f"{model}: contains no {', '.join(missing)}")
    tokenizers = Tokenizers(root)
    configs = {name: component.read_config(root) for name, component in NETWORKS.items()}
    networks = {name: component.abstract(configs[name], dtype) for name, component in NETWORKS.items()}
    sources = {name: StoredNetwork.open(paths[component.folder]) for name, component in NETWORKS.items()}
    with byte_progress(progress) as bar:
        task = bar.add_task("loading", total=sum(source.nbytes for source in sources.values()))
        options = {"dtype": dtype, "sharding_for": sharding_for(mesh), "on_bytes": lambda n: bar.advance(task, n)}
        for name, component in NETWORKS.items():
            sources[name].load(networks[name], component, configs[name], **options)
    parts = {name: nnx.split(network) for name, network in networks.items()}
    return Encoders(
        Graphs(**{name: graph for name, (graph, _) in parts.items()}),
        {name: weights for name, (_, weights) in parts.items()},
        tokenizers,
        configs["vae"],
        configs["clip"].max_position_embeddings,
        defaults_of(found, TRANSFORMER.read_config(root)),
    )


@partial(jax.jit, static_argnames=("graphs", "dtype", "mesh"))
def encode(
    graphs: Graphs,
    dtype: Dtype,
    mesh: Mesh,
    weights: Mapping[str, Any],
    good: UInt8[Array, "b y x 3"],
    bad: UInt8[Array, "b v w 3"],
    clip_ids: Int[Array, "b 77"],
    t5_ids: Int[Array, "b 2 t"],
) -> Encoded:
    """Encodes pixels and tokens of a batch, sharded along the mesh; the outputs are of ``dtype``."""

    # One image at a time, as in training; each device has its own.
    @partial(jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), BATCH), out_specs=BATCH, check_vma=False)
    def moments(vae: Any, pixels: Array) -> tuple[Array, Array]:
        network = nnx.merge(graphs.vae, vae)

        def one(image: Array) -> tuple[Array, Array]:
            mean, logvar = network.encode(to_network_range(image[None]).astype(dtype))
            return mean[0].astype(dtype), logvar[0].astype(dtype)

        return jax.lax.map(one, pixels)

    _, pooled = nnx.merge(graphs.clip, weights["clip"])(clip_ids)
    # The two texts of a sample one after the other: batches of the same shape as in training round alike.
    text = jax.lax.map(lambda ids: nnx.merge(graphs.t5, weights["t5"])(ids), jnp.swapaxes(t5_ids, 0, 1))
    return Encoded(
        moments(weights["vae"], good),
        moments(weights["vae"], bad),
        pooled.astype(dtype),
        jnp.swapaxes(text, 0, 1).astype(dtype),
    )


def identity_of(model: Encoders | FluxModel) -> str:
    """A hash of the encoders' weights and of the latents' scaling, independent of path and sharding.

    Args:
        model: Encoders, or a FluxModel.
    """
    sums: dict[str, list[Any]] = {}
    for name in NETWORKS:
        state = nnx.to_flat_state(model.weights[name])
        flat = sorted((".".join(map(str, path)), leaf.get_value()) for path, leaf in state)
        totals = jax.device_get(_bit_sums([leaf for _, leaf in flat]))
        sums[name] = [[path, list(leaf.shape), int(total)] for (path, leaf), total in zip(flat, totals, strict=True)]
    content = json.dumps([asdict(model.vae_config), sums], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@jax.jit
def _bit_sums(leaves: list[Array]) -> list[Array]:
    # Integers, so that the order in which devices add does not matter.
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    bits = (jax.lax.bitcast_convert_type(leaf, kinds[leaf.dtype.itemsize]) for leaf in leaves)
    return [jnp.sum(one, dtype=jnp.uint32) for one in bits]


AHEAD = 4  # batches that are decoded in advance


def precompute(config: PrecomputeConfig, *, show: bool = True) -> dict[str, int]:
    """Encodes every record that is not encoded yet, and then marks the folder as complete.

    Args:
        show: draw progress bars.

    Returns:
        The number of records of each subset.
    """
    out = Path(config.out)
    with usable_folder(out), Claim(out):
        if (out / COMPLETE).exists():
            raise InputError(f"{out}: all is encoded already; name another folder to encode anew")
        return _encode_missing(config, out, show)


def _encode_missing(config: PrecomputeConfig, out: Path, show: bool) -> dict[str, int]:
    data, dtype = config.data, jnp.dtype(config.dtype)
    source = open_source(data)
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    encoders = load_encoders(config.model, dtype, mesh, progress=show)
    data.require_grid(encoders.token_pixels)
    settings = LatentMetadata(
        config.model,
        identity_of(encoders),
        data.target_size,
        data.condition_size,
        data.crop,
        config.max_sequence_length or encoders.defaults.max_sequence_length,
        config.dtype,
        source.fingerprint,
    )
    if (out / SETTINGS).exists():
        wanted = vars(settings)
        require_same(out, read_settings(out), {name: wanted[name] for name in wanted if name != "model"})
    elif any(path.name != LOCK for path in out.iterdir()):
        raise InputError(f"{out}: contains other files; name an empty folder")
    else:
        write_file(out / SETTINGS, settings_text(settings))
    counts = {name: source.counts.get(name, 0) for name in SUBSETS}
    with count_progress(show) as bar, reproducible(dtype):
        task = bar.add_task("Encoding records", total=sum(counts.values()))
        writer = Writer(config, encoders, settings, mesh)
        writer.write_shared(out / SHARED)
        jobs = [Job(name, index) for name, count in counts.items() for index in range(count)]
        missing = [job for job in jobs if not (out / file_name(*job)).exists()]
        bar.advance(task, len(jobs) - len(missing))
        for done in writer.write(out, missing, Prepare(source, data)):
            bar.advance(task, done)
    write_file(out / COMPLETE, json.dumps(counts))
    return counts


class Writer:
    """Encodes batches and writes files of them."""

    def __init__(self, config: PrecomputeConfig, encoders: Encoders, settings: LatentMetadata, mesh: Mesh):
        self._encoders, self._settings, self._mesh = encoders, settings, mesh
        self._dtype, self._workers = jnp.dtype(config.dtype), worker_count(config.data.workers)
        devices = samples_along(mesh)
        self._size = -(-config.batch_size // devices) * devices

    def write_shared(self, path: Path) -> None:
        """Writes the outputs for dropped inputs: a black image, an empty text."""
        if path.exists():
            return
        side, small = self._settings.target_size, self._settings.condition_size
        good, bad = np.zeros((side, side, 3), np.uint8), np.zeros((small, small, 3), np.uint8)
        arrays = jax.device_get(self._start([Prepared(LatentEntry("", "", ""), good, bad)]))
        black = {"black_mean": arrays.bad[0][0], "black_logvar": arrays.bad[1][0]}
        if not all(map(all_finite, (*black.values(), arrays.text[0, 0]))):
            raise RunError(f"{self._settings.model}: a black image and an empty text become NaN or infinite numbers")
        with atomic_output(path) as file:
            save_tensors(file, black | {"empty_text": arrays.text[0, 0]})

    def write(self, out: Path, jobs: Sequence[Job], prepare: Prepare) -> Iterator[int]:
        """Writes the files of these jobs; yields the number of records in each."""
        with Workers(prepare, self._workers) as workers:
            encoded = self._encoded(ahead(workers, jobs, AHEAD * self._size))
            for name, group in groupby(zip(jobs, encoded, strict=True), lambda pair: file_name(*pair[0])):
                records = [record for _, record in group]
                assert len(records) <= RECORDS_IN_FILE
                tensors = {
                    f"{i}.{key}": tensor for i, (_, found) in enumerate(records) for key, tensor in found.items()
                }
                with atomic_output(out / name) as file:
                    save_tensors(file, tensors, {"entries": json.dumps([list(entry) for entry, _ in records])})
                yield len(records)

    def _encoded(self, found: Iterator[Prepared]) -> Iterator[tuple[LatentEntry, dict[str, np.ndarray]]]:
        """Each record with its tensors; while one batch is computed, the previous one is fetched and written."""
        pending: deque[tuple[list[Prepared], Encoded | None]] = deque()
        while batch := list(islice(found, self._size)):
            usable = [one for one in batch if not one.entry.trouble]
            pending.append((batch, self._start(usable) if usable else None))
            if len(pending) > 1:
                yield from _split_batch(*pending.popleft())
        while pending:
            yield from _split_batch(*pending.popleft())

    def _start(self, usable: list[Prepared]) -> Encoded:
        # Padded to a fixed size, so that it compiles once.
        full = [usable[min(i, len(usable) - 1)] for i in range(self._size)]
        tokenizers, length = self._encoders.tokenizers, self._settings.text_length
        texts = [text for one in full for text in one.entry.texts]
        host = (
            np.stack([one.good for one in full]),
            np.stack([one.bad for one in full]),
            tokenizers.clip([one.entry.prompt for one in full], self._encoders.clip_length),
            tokenizers.t5(texts, length).reshape(-1, 2, length),
        )
        batch = put_batch(self._mesh, host)
        return encode(self._encoders.graphs, self._dtype, self._mesh, self._encoders.weights, *batch)


def _split_batch(batch: list[Prepared], encoded: Encoded | None) -> Iterator[tuple[LatentEntry, dict[str, np.ndarray]]]:
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
        if one.entry.has_reflection:
            tensors["text_with_reflection"] = arrays.text[row, 0]
        row += 1
        broken = [name for name, numbers in tensors.items() if not all_finite(numbers)]
        if broken:
            yield LatentEntry("", "", "", f"{one.entry.key}: its {broken[0]} is NaN or infinite"), {}
        else:
            yield one.entry, tensors
