"""Batches of precomputed latents: what ``make_encode`` does, without the encoders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rflow_jax.data.sources.latents import LatentBatch, LatentMetadata, open_latents, require_same
from rflow_jax.flow import pack
from rflow_jax.models.autoencoder import sample_posterior
from rflow_jax.parallel.mesh import BATCH, put_batch
from rflow_jax.precompute.precompute import identity_of
from rflow_jax.training.corrector.loss import Examples
from rflow_jax.training.corrector.step import BAD, GOOD, StepSpec, sample_keys
from rflow_jax.typing import Array, Float, UInt32
from rflow_jax.weights.flux import FluxModel


class LatentInputs(NamedTuple):
    """A batch as it leaves the host; posteriors as (mean, log variance).

    Attributes:
        numbers: of the samples, as in ``StepInputs``.
    """

    good: tuple[Float[Array, "b y x z"], Float[Array, "b y x z"]]
    bad: tuple[Float[Array, "b v w z"], Float[Array, "b v w z"]]
    pooled: Float[Array, "b p"]
    text: Float[Array, "b t e"]
    numbers: UInt32[Array, " b"]


def put_latents(mesh: Mesh) -> Callable[[LatentBatch], LatentInputs]:
    """A function that puts a batch onto the mesh."""
    return lambda batch: LatentInputs(*put_batch(mesh, (*batch.latents, batch.numbers)))


def make_encode_latents(flux: FluxModel, recipe: StepSpec, mesh: Mesh) -> Callable[[Any, LatentInputs], Examples]:
    """A jitted function of (anything, inputs), which only draws from the posteriors.

    The draws are those of ``make_encode`` for the same numbers.
    """
    config, dtype = flux.vae_config, recipe.dtype

    @partial(jax.shard_map, mesh=mesh, in_specs=(BATCH, BATCH), out_specs=BATCH, check_vma=False)
    def tokens(inputs: LatentInputs, keys: Array) -> tuple[Array, Array]:
        def draw(posterior: tuple[Array, Array], key: Array, purpose: int) -> Array:
            mean, logvar = (x[None].astype(jnp.float32) for x in posterior)
            noise = jax.random.normal(jax.random.fold_in(key, purpose), mean.shape)
            sample = sample_posterior(mean, logvar, noise)
            return pack((sample - config.shift_factor) * config.scaling_factor)[0].astype(dtype)

        good = jax.vmap(partial(draw, purpose=GOOD))(inputs.good, keys)
        return good.astype(jnp.float32), jax.vmap(partial(draw, purpose=BAD))(inputs.bad, keys)

    @jax.jit
    def encode(_: Any, inputs: LatentInputs) -> Examples:
        x_0, condition = tokens(inputs, sample_keys(recipe.seed, inputs.numbers))
        return Examples(x_0, condition, inputs.text.astype(dtype), inputs.pooled.astype(dtype))

    return encode


def require_latents_of(folder: str | list[str], flux: FluxModel, recipe: StepSpec) -> LatentMetadata:
    """Checks what the latents in a folder were made with, and returns it.

    Raises:
        InputError: they cannot be used, or training uses another model, dtype or length of texts.
    """
    source = open_latents(folder)
    kept = source.settings
    require_same(source.folder, kept, {"dtype": jnp.dtype(recipe.dtype).name, "text_length": recipe.shape.text})
    if kept.identity != (identity := identity_of(flux)):
        require_same(source.folder, kept, {"identity": f"{identity} ({flux.name}; it was {kept.model})"})
    return kept
