"""The corrector's step: encode a batch, draw times and noise, update. Compiled over a mesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.typing import Dtype
from jax.sharding import Mesh, PartitionSpec

from rflow_jax.flow import rope_for
from rflow_jax.generation.sampling import encode_condition
from rflow_jax.models.flux.config import ConditionFlags
from rflow_jax.models.flux.layers import Rope
from rflow_jax.models.flux.transformer import FluxGraph, FluxTransformer
from rflow_jax.models.options import AttentionImpl, Remat
from rflow_jax.parallel.mesh import BATCH, traced_on
from rflow_jax.training.corrector.loss import Examples, flow_matching_losses
from rflow_jax.training.train_state import Metrics, StepMetrics, TrainState, compile_step, make_update
from rflow_jax.typing import Array, Float, Int, UInt8, UInt32
from rflow_jax.weights.flux import FluxModel

# What a sample's key is folded with for each of its draws, and the run's key for the first LoRA.
TIME, NOISE, GOOD, BAD = range(4)
INIT = 2**32 - 1  # no sample has this number
PIXELS_TOGETHER = 2**18  # of pictures that go through the autoencoder at once
ENCODERS = ("vae", "clip", "t5")  # whose weights the function from make_encode takes


class StepInputs(NamedTuple):
    """A batch as it leaves the host.

    Attributes:
        numbers: of the samples, counted from the beginning of the run; they determine all randomness of a sample.
    """

    good: UInt8[Array, "b y x 3"]
    bad: UInt8[Array, "b v w 3"]
    clip_ids: Int[Array, "b 77"]
    t5_ids: Int[Array, "b t"]
    numbers: UInt32[Array, " b"]


@dataclass(frozen=True)
class TokenShape:
    """Sizes of a training batch, in tokens; they determine the rotary angles."""

    text: int
    image: tuple[int, int]
    condition: tuple[int, int]


@dataclass(frozen=True)
class StepSpec:
    """The settings of a step.

    Attributes:
        dtype: of the activations.
        gradient_accumulation_steps: number of parts of a batch, processed one after the other.
    """

    seed: int
    dtype: Dtype
    shape: TokenShape
    flags: ConditionFlags = ConditionFlags()
    remat: Remat = "full"
    gradient_accumulation_steps: int = 1
    attention: AttentionImpl = "auto"


def sample_keys(seed: int, numbers: UInt32[Array, " b"]) -> Array:
    """One key per sample, [b], which does not depend on the batch it is in."""
    run = jax.random.key(seed, impl="threefry2x32")
    return jax.vmap(partial(jax.random.fold_in, run))(numbers)


def make_encode(flux: FluxModel, recipe: StepSpec, mesh: Mesh) -> Callable[[Any, StepInputs], Examples]:
    """A jitted function of (the encoders' weights, inputs)."""
    graphs, dtype = flux.graphs, recipe.dtype

    # Large pictures go one at a time through the autoencoder to bound memory, on each device its own; on a CPU, which
    # would gain nothing, also small ones: latents are then the same in every batch.
    at_once = 0 if mesh.devices.flat[0].platform == "cpu" else PIXELS_TOGETHER

    @partial(jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), BATCH, BATCH), out_specs=BATCH, check_vma=False)
    def tokens(vae: Any, inputs: tuple[Array, Array], keys: Array) -> tuple[Array, Array]:
        network = nnx.merge(graphs.vae, vae)
        good, bad = inputs

        def encode(pictures: Array, draw: int) -> Array:
            together = max(1, at_once // (pictures.shape[1] * pictures.shape[2]))
            return encode_condition(network, dtype, False, pictures, keys, draw, together=together)

        return encode(good, GOOD).astype(jnp.float32), encode(bad, BAD)

    @jax.jit
    @partial(traced_on, mesh)
    def encode(weights: Any, inputs: StepInputs) -> Examples:
        keys = sample_keys(recipe.seed, inputs.numbers)
        x_0, condition = tokens(weights["vae"], (inputs.good, inputs.bad), keys)
        _, pooled = nnx.merge(graphs.clip, weights["clip"])(inputs.clip_ids)
        text = nnx.merge(graphs.t5, weights["t5"])(inputs.t5_ids)
        return Examples(x_0, condition, text.astype(dtype), pooled.astype(dtype))

    return encode


def batch_losses(
    network: FluxTransformer, recipe: StepSpec, rope: Rope, examples: Examples, keys: Array, t: Array | None = None
) -> Float[Array, " b"]:
    """The loss of each sample at its own time (the sigmoid of a standard normal) and noise.

    Args:
        t: times to take instead of drawn ones, [b].
    """
    if t is None:
        t = jax.nn.sigmoid(jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, TIME)))(keys))
    shape = examples.x_0.shape[1:]
    x_1 = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, NOISE), shape))(keys)
    options = {"dtype": recipe.dtype, "flags": recipe.flags, "attention": recipe.attention, "remat": recipe.remat}
    return flow_matching_losses(network, examples, t, x_1, rope, **options)


def make_step(
    graph: FluxGraph, optimizer: optax.GradientTransformation, recipe: StepSpec, mesh: Mesh, shardings: Any
) -> Any:
    """A jitted function of (state, frozen parameters, examples, numbers of the samples); the state is donated.

    Args:
        graph: of the transformer.
        shardings: of the state.
    """

    def objective(trainable: nnx.State, frozen: nnx.State, batch: tuple[Examples, Array]) -> tuple[Array, Metrics]:
        examples, numbers = batch
        # Made here, it is a constant of the program; made outside, it would be fetched from a device.
        rope = rope_for(graph.config, recipe.shape.text, recipe.shape.image, recipe.shape.condition)
        keys = sample_keys(recipe.seed, numbers)
        return jnp.mean(batch_losses(graph.merge(trainable, frozen), recipe, rope, examples, keys)), {}

    update = make_update(
        objective, optimizer, gradient_accumulation_steps=recipe.gradient_accumulation_steps, mesh=mesh
    )

    def step(
        state: TrainState, frozen: nnx.State, examples: Examples, numbers: Array
    ) -> tuple[TrainState, StepMetrics]:
        return update(state, frozen, (examples, numbers))

    return compile_step(step, shardings, mesh)
