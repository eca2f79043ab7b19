"""The compiled functions of generation: tokens and seeds -> noise and encodings -> pixels."""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from rflow_jax.errors import InputError
from rflow_jax.flow import PATCH, euler, guided, pack, rope_for, unpack
from rflow_jax.models.autoencoder import AutoencoderKL, sample_posterior
from rflow_jax.models.flux.config import ConditionFlags
from rflow_jax.models.flux.layers import Context, Rope
from rflow_jax.models.flux.transformer import FluxTransformer, Modulations
from rflow_jax.models.options import AttentionImpl
from rflow_jax.models.partitioning import each_sample
from rflow_jax.typing import Array, Bool, Float, Int, UInt8
from rflow_jax.weights.flux import GraphDefs, Weights

Seed = SupportsIndex | tuple[SupportsIndex, ...]


@dataclasses.dataclass(frozen=True)
class PerturbedSeed:
    """A seed for noise in the neighbourhood of other noise.

    Beginning with the noise of ``path[0]``, each further seed turns it a little: n -> cosine n + sqrt(1 - cosine^2) n',
    with n' the noise of that seed. The result is standard normal too. In this many dimensions the angle between
    neighbours is constant to a part in a thousand.

    Attributes:
        path: plain seeds, at least one.
        cosine: of the angle between neighbours, in (0, 1).
    """

    path: tuple[Seed, ...]
    cosine: float

    def weights(self) -> list[float]:
        """The weight of each seed's noise in the sum; their squares sum to 1."""
        turned = (1 - self.cosine**2) ** 0.5
        further = len(self.path) - 1
        return [
            (turned if number else 1.0) * self.cosine ** (further - max(number, 0)) for number in range(further + 1)
        ]


CONDITION_TIME = 0.0  # the condition is clean
BLACK_GUIDANCE = 1.0  # the distilled guidance of the branch with the black condition

# The numbers that a sample's key is folded with for each of its draws.
NOISE, CONDITION, BLACK = range(3)


@dataclasses.dataclass(frozen=True)
class StaticArgs:
    """The static arguments of a compiled program."""

    height: int
    width: int
    condition_size: int | None  # None: no condition
    token_pixels: int
    flags: ConditionFlags
    use_image_guidance: bool
    use_condition_scale: bool
    tiled: bool = False
    attention: AttentionImpl = "auto"

    @property
    def image_grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        return self.height // self.token_pixels, self.width // self.token_pixels

    @property
    def image_tokens(self) -> int:
        return self.image_grid[0] * self.image_grid[1]

    @property
    def condition_grid(self) -> tuple[int, int] | None:
        """Rows and columns of condition tokens."""
        if self.condition_size is None:
            return None
        side = self.condition_size // self.token_pixels
        return side, side


class Inputs(NamedTuple):
    """One batch, as it leaves the host."""

    clip_ids: Int[Array, "b 77"]
    t5_ids: Int[Array, "b t"]
    keys: Array  # [b] random keys
    condition: UInt8[Array, "b y x 3"] | None


class NoiseSpec(NamedTuple):
    """A sample's noise as a weighted sum of standard normal draws."""

    keys: Array  # [b, k] random keys
    weights: Float[Array, "b k"]


class Conditioning(NamedTuple):
    """The encodings that sampling is conditioned on."""

    text: Float[Array, "b t e"]
    pooled: Float[Array, "b p"]
    condition: Float[Array, "b c f"] | None
    black: Float[Array, "b c f"] | None


class Sampled(NamedTuple):
    """One batch, as it leaves the devices; ``finite`` has a column for each of :data:`CHECKED`."""

    latents: Float[Array, "b i f"]
    pixels: UInt8[Array, "b y x 3"]
    finite: Bool[Array, "b 4"]


# What is checked for NaN and infinity, in the order in which each follows from the others: the first is the cause.
CHECKED = ("the encoding of its texts", "the encoding of its condition", "its latents", "its pixels")


class DynamicArgs(NamedTuple):
    """Numbers that change without a new compilation."""

    sigmas: Float[Array, " n"]
    guidance: Float[Array, ""]
    condition_scale: Float[Array, ""]
    image_guidance_scale: Float[Array, ""]


def sample_keys(seeds: Sequence[Seed]) -> Array:
    """One key per seed, [b]; seeds are whole numbers of any size (numpy's too), or tuples of them.

    A key depends on the numbers only. The generator is named, so JAX's default does not matter; the bits it draws from
    a key also depend on ``jax_threefry_partitionable``, which the pipeline keeps on
    (:func:`rflow_jax.parallel.runtime.reproducible`).

    Raises:
        InputError: not a seed.
    """
    data = np.stack([np.frombuffer(_digest(seed), np.uint32, count=2) for seed in seeds])
    return jax.random.wrap_key_data(jnp.asarray(data), impl="threefry2x32")


def noise_draws(seeds: Sequence[Seed | PerturbedSeed]) -> NoiseSpec:
    """The draws of each seed's noise, padded to a power of two with draws of weight 0, which change no bit."""
    paths = [seed.path if isinstance(seed, PerturbedSeed) else (seed,) for seed in seeds]
    weights = [seed.weights() if isinstance(seed, PerturbedSeed) else [1.0] for seed in seeds]
    width = 1 << (max(map(len, paths)) - 1).bit_length()
    rows = [(*path, *path[:1] * (width - len(path))) for path in paths]
    padded = np.asarray([[*row, *[0.0] * (width - len(row))] for row in weights], np.float32)
    keys = sample_keys([seed for row in rows for seed in row])
    return NoiseSpec(keys.reshape(len(rows), width), jnp.asarray(padded))


def _digest(seed: Seed) -> bytes:
    """A hash of the numbers in decimal, distinct for seeds of any size and length."""
    numbers = seed if isinstance(seed, tuple) else (seed,)
    try:
        if any(isinstance(number, bool) for number in numbers):  # they are numbers to Python, and a mistake here
            raise TypeError
        whole = [operator.index(number) for number in numbers]
    except TypeError:
        whole = []
    if not whole or min(whole) < 0:
        raise InputError(f"a seed must be a whole number from 0, or a tuple of them, not {seed!r}")
    return hashlib.sha256("-".join(map(str, whole)).encode()).digest()


def draw_noise(program: StaticArgs, grid: tuple[int, int, int], draws: NoiseSpec) -> Float[Array, "b i f"]:
    """The noise of a batch, packed.

    Args:
        grid: of the latents: rows, columns, channels.
    """

    def of_sample(keys: Array, weights: Array) -> Array:
        normal = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, NOISE), grid))(keys)
        # One after the other: a sum in an order of XLA's own could round otherwise in another batch.
        total = weights[0] * normal[0]
        for number in range(1, keys.shape[0]):
            total = total + weights[number] * normal[number]
        return total

    return pack(jax.vmap(of_sample)(*draws))


def prepare(graphs: GraphDefs, dtype: Dtype, program: StaticArgs, weights: Weights, inputs: Inputs) -> Conditioning:
    """Encodes the texts and the condition."""
    _, pooled = nnx.merge(graphs.clip, weights["clip"])(inputs.clip_ids)
    text = nnx.merge(graphs.t5, weights["t5"])(inputs.t5_ids)
    vae = nnx.merge(graphs.vae, weights["vae"])
    condition = black = None
    if inputs.condition is not None:
        encode = partial(encode_condition, vae, dtype, program.tiled)
        condition = encode(inputs.condition, inputs.keys, CONDITION)
        if program.use_image_guidance:
            black = encode(jnp.zeros_like(inputs.condition), inputs.keys, BLACK)
    return Conditioning(text.astype(dtype), pooled.astype(dtype), condition, black)


def encode_condition(
    vae: AutoencoderKL,
    dtype: Dtype,
    tiled: bool,
    pixels: UInt8[Array, "b y x 3"],
    keys: Array,
    draw: int,
    *,
    together: int = 1,
) -> Float[Array, "b c f"]:
    """Condition images -> packed latents, a draw from the posterior each.

    Args:
        together: images that are encoded at once; one at a time bounds memory.
    """
    graph, parameters = nnx.split(vae)

    def encode(parameters: nnx.State, one: tuple[Array, Array]) -> Array:
        vae = nnx.merge(graph, parameters)
        image, key = one
        mean, logvar = vae.encode(to_network_range(image[None]).astype(dtype), tiled=tiled)
        noise = jax.random.normal(jax.random.fold_in(key, draw), mean.shape)
        sample = sample_posterior(mean.astype(jnp.float32), logvar.astype(jnp.float32), noise)
        return pack(vae.scale(sample))[0].astype(dtype)

    return each_sample(encode, parameters, (pixels, keys), together)


def sample(
    graphs: GraphDefs,
    dtype: Dtype,
    program: StaticArgs,
    weights: Weights,
    noise: Array,
    given: Conditioning,
    scales: DynamicArgs,
) -> Sampled:
    """Integrates the flow and decodes."""
    transformer = graphs.transformer.merge(*weights["transformer"])
    rope = rope_for(transformer.config, given.text.shape[1], program.image_grid, program.condition_grid)
    x, _ = euler(velocity_of(transformer, dtype, program, given, scales, rope), noise, scales.sigmas)
    vae = nnx.merge(graphs.vae, weights["vae"])
    images = decode_latents(vae, dtype, x, program.image_grid, program.tiled)
    checked = (given.text, given.pooled), (given.condition, given.black), (x,), (images,)
    return Sampled(x, to_pixels(images), jnp.stack([_finite(parts, len(x)) for parts in checked], axis=1))


def _finite(parts: Sequence[Array | None], count: int) -> Bool[Array, " b"]:
    """Whether all numbers of each sample are finite."""
    rows = [jnp.isfinite(part).reshape(count, -1).all(axis=1) for part in parts if part is not None]
    return jnp.stack(rows).all(axis=0) if rows else jnp.ones(count, bool)


def decode_latents(
    vae: AutoencoderKL, dtype: Dtype, x: Float[Array, "b i f"], grid: tuple[int, int], tiled: bool
) -> Float[Array, "b y x 3"]:
    """Packed latents -> images, about [-1, 1]; one image at a time to bound memory."""
    latents = unpack(x, *(PATCH * side for side in grid))
    graph, parameters = nnx.split(vae)

    def decode(parameters: nnx.State, one: Array) -> Array:
        vae = nnx.merge(graph, parameters)
        return vae.decode(vae.unscale(one[None]).astype(dtype), tiled=tiled)[0]

    return each_sample(decode, parameters, latents)


def velocity_of(
    transformer: FluxTransformer,
    dtype: Dtype,
    program: StaticArgs,
    given: Conditioning,
    scales: DynamicArgs,
    rope: Rope,
) -> Callable[[Array, Array, Array], Array]:
    """The velocity field of one batch: the network's, with image guidance if set.

    It is a function of x and the index of the step; the step's time is in ``scales``.
    """

    def branch(condition: Array | None, guidance: Array | float) -> Callable[[Array, Array], Array]:
        """The network with one condition and one guidance."""
        scale = scales.condition_scale if program.use_condition_scale else None
        ctx = transformer.context(program.image_tokens, condition, rope, scale, program.flags, program.attention)
        modulations = _modulations_of_steps(transformer, scales.sigmas[:-1], guidance, given.pooled, dtype, ctx)

        def velocity(x: Array, step: Array) -> Array:
            at_step = jax.tree.map(lambda vectors: vectors[step], modulations)
            return transformer.velocity(x.astype(dtype), given.text, condition, at_step, ctx).astype(jnp.float32)

        return velocity

    conditioned = branch(given.condition, scales.guidance)
    if not program.use_image_guidance:
        return lambda x, t, step: conditioned(x, step)
    black = branch(given.black, BLACK_GUIDANCE)
    return lambda x, t, step: guided(conditioned(x, step), black(x, step), scales.image_guidance_scale)


def _modulations_of_steps(
    transformer: FluxTransformer, times: Array, guidance: Array | float, pooled: Array, dtype: Dtype, ctx: Context
) -> Modulations:
    """The modulations of every step: leaves [steps, b, k, o], those of stacked blocks [steps, l, b, k, o]."""
    steps, b = times.shape[0], pooled.shape[0]
    guidances = jnp.full(steps * b, guidance, jnp.float32) if transformer.config.guidance_embeds else None
    flat = transformer.modulations(
        jnp.repeat(times, b), guidances, jnp.tile(pooled, (steps, 1)), CONDITION_TIME, dtype, ctx
    )

    def by_step(vectors: Array) -> Array:
        *blocks, _, k, o = vectors.shape
        return jnp.moveaxis(vectors.reshape(*blocks, steps, b, k, o), len(blocks), 0)

    return jax.tree.map(by_step, flat)


def to_network_range(pixels: UInt8[Array, "*b 3"]) -> Float[Array, "*b 3"]:
    """0..255 -> -1..1."""
    return pixels.astype(jnp.float32) / 255.0 * 2.0 - 1.0


def to_pixels(images: Float[Array, "*b 3"]) -> UInt8[Array, "*b 3"]:
    """-1..1 -> 0..255, clipped and rounded."""
    unit = jnp.clip(images.astype(jnp.float32) / 2.0 + 0.5, 0.0, 1.0)
    return jnp.round(unit * 255.0).astype(jnp.uint8)
