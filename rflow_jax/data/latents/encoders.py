"""A model's autoencoder and text encoders without its transformer, and how to tell them from another model's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from rflow_jax.errors import InputError
from rflow_jax.flow.latents import PATCH
from rflow_jax.models.autoencoder import AutoencoderConfig
from rflow_jax.parallel.mesh import BATCH
from rflow_jax.parallel.sharding import sharding_for
from rflow_jax.progress import byte_progress
from rflow_jax.prompts import Tokenizers
from rflow_jax.sampling import to_network_range
from rflow_jax.typing import Array, Float, Int, UInt8
from rflow_jax.weights.bundle import DISTILLED_T5_LENGTH, T5_LENGTH, Source
from rflow_jax.weights.components import CLIP, T5, TRANSFORMER, VAE
from rflow_jax.weights.folders import describe
from rflow_jax.weights.hub import resolve

NETWORKS = {"vae": VAE, "clip": CLIP, "t5": T5}


class Graphs(NamedTuple):
    """The networks without their weights."""

    vae: Any
    clip: Any
    t5: Any


@dataclass(frozen=True)
class Encoders:
    """What pictures and texts go through before the transformer; the names are those of ``Bundle``."""

    graphs: Graphs
    weights: dict[str, Any]
    tokenizers: Tokenizers
    vae_config: AutoencoderConfig
    clip_length: int
    default_t5_length: int

    @property
    def token_pixels(self) -> int:
        """Pixels a side of one image token."""
        return self.vae_config.factor * PATCH


class Encoded(NamedTuple):
    """A batch after the encoders; posteriors as (mean, log variance).

    Attributes:
        text: of two texts for each sample.
    """

    good: tuple[Float[Array, "b y x z"], Float[Array, "b y x z"]]
    bad: tuple[Float[Array, "b v w z"], Float[Array, "b v w z"]]
    pooled: Float[Array, "b p"]
    text: Float[Array, "b 2 t e"]


def load_encoders(model: str, dtype: Any, mesh: Mesh, *, progress: bool = True) -> Encoders:
    """Loads three of a model's networks.

    Raises:
        InputError: the model cannot be found or used.
    """
    root = resolve(model)
    places = describe(root).components
    if missing := [component.folder for component in NETWORKS.values() if component.folder not in places]:
        raise InputError(f"{model}: holds no {', '.join(missing)}")
    tokenizers = Tokenizers(root)
    configs = {name: component.read_config(root) for name, component in NETWORKS.items()}
    networks = {name: component.abstract(configs[name], dtype) for name, component in NETWORKS.items()}
    sources = {name: Source.open(places[component.folder]) for name, component in NETWORKS.items()}
    with byte_progress(progress) as bar:
        task = bar.add_task("loading", total=sum(source.nbytes for source in sources.values()))
        how = {"dtype": dtype, "sharding_for": sharding_for(mesh), "on_bytes": lambda done: bar.advance(task, done)}
        for name, component in NETWORKS.items():
            sources[name].load(networks[name], component, configs[name], **how)
    parts = {name: nnx.split(network) for name, network in networks.items()}
    return Encoders(
        Graphs(**{name: graph for name, (graph, _) in parts.items()}),
        {name: weights for name, (_, weights) in parts.items()},
        tokenizers,
        configs["vae"],
        configs["clip"].max_position_embeddings,
        T5_LENGTH if TRANSFORMER.read_config(root).guidance_embeds else DISTILLED_T5_LENGTH,
    )


@partial(jax.jit, static_argnames=("graphs", "dtype", "mesh"))
def encode(
    graphs: Graphs,
    dtype: Any,
    mesh: Mesh,
    weights: Mapping[str, Any],
    good: UInt8[Array, "b y x 3"],
    bad: UInt8[Array, "b v w 3"],
    clip_ids: Int[Array, "b 77"],
    t5_ids: Int[Array, "b 2 t"],
) -> Encoded:
    """Pixels and tokens of a batch, cut along the mesh -> what the encoders make of them, in the number type given."""

    # One picture at a time, as in training; each device has its own.
    @partial(jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), BATCH), out_specs=BATCH, check_vma=False)
    def moments(vae: Any, pixels: Array) -> tuple[Array, Array]:
        network = nnx.merge(graphs.vae, vae)

        def one(image: Array) -> tuple[Array, Array]:
            mean, logvar = network.encode(to_network_range(image[None]).astype(dtype))
            return mean[0].astype(dtype), logvar[0].astype(dtype)

        return jax.lax.map(one, pixels)

    _, pooled = nnx.merge(graphs.clip, weights["clip"])(clip_ids)
    # Both kinds of text one after the other: batches of the shape that training has round alike.
    text = jax.lax.map(lambda ids: nnx.merge(graphs.t5, weights["t5"])(ids), jnp.swapaxes(t5_ids, 0, 1))
    return Encoded(
        moments(weights["vae"], good),
        moments(weights["vae"], bad),
        pooled.astype(dtype),
        jnp.swapaxes(text, 0, 1).astype(dtype),
    )


def identity_of(model: Any) -> str:
    """A hash of the encoders' weights and of how latents are scaled; the same wherever a model lies and however cut.

    Args:
        model: Encoders, or a Bundle.
    """
    sums = {name: _sums(model.weights[name]) for name in NETWORKS}
    content = json.dumps([asdict(model.vae_config), sums], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _sums(state: Any) -> list[list[Any]]:
    """For each weight its path, shape and the sum of its bits."""
    flat = sorted((".".join(map(str, path)), leaf.get_value()) for path, leaf in nnx.to_flat_state(state))
    sums = jax.device_get(_bit_sums([leaf for _, leaf in flat]))
    return [[path, list(leaf.shape), int(total)] for (path, leaf), total in zip(flat, sums, strict=True)]


@jax.jit
def _bit_sums(leaves: list[Array]) -> list[Array]:
    # Whole numbers, so that the order does not matter in which devices add.
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    bits = (jax.lax.bitcast_convert_type(leaf, kinds[leaf.dtype.itemsize]) for leaf in leaves)
    return [jnp.sum(one, dtype=jnp.uint32) for one in bits]
