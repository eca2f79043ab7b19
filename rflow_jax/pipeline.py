"""Prompt (and an image to correct) -> image: batched, jitted, the same for a sample wherever it lies in a batch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from rflow_jax.errors import InputError
from rflow_jax.flow.latents import PATCH, pack, rope_for, unpack
from rflow_jax.flow.sampler import euler, guided
from rflow_jax.images import condition_pixels
from rflow_jax.models.attention import AttentionImpl
from rflow_jax.models.autoencoder import AutoencoderKL, sample_posterior
from rflow_jax.models.flux.blocks import Context
from rflow_jax.models.flux.config import ConditionFlags
from rflow_jax.models.flux.embeddings import Rope
from rflow_jax.models.flux.transformer import FluxTransformer, Modulations
from rflow_jax.parallel.runtime import use_compilation_cache
from rflow_jax.prompts import t5_prompt
from rflow_jax.settings import Settings
from rflow_jax.typing import Array, Float, Int, UInt8
from rflow_jax.weights.bundle import Bundle, load_bundle

Seed = int | tuple[int, ...]
OnImages = Callable[[int, list[Image.Image]], None]
CONDITION_TIME = 0.0  # the condition is clean
BLACK_GUIDANCE = 1.0  # the distilled guidance of the branch with the black condition

# What a sample's key is folded with for each of its draws.
NOISE, CONDITION, BLACK = range(3)


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled program depends on, besides the shapes of its arguments."""

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


class Given(NamedTuple):
    """What sampling is conditioned on."""

    text: Float[Array, "b t e"]
    pooled: Float[Array, "b p"]
    condition: Float[Array, "b c f"] | None
    black: Float[Array, "b c f"] | None


class Scales(NamedTuple):
    """Numbers that change without a new compilation."""

    sigmas: Float[Array, " n"]
    guidance: Float[Array, ""]
    condition_scale: Float[Array, ""]
    image_guidance_scale: Float[Array, ""]


class Pipeline:
    """A loaded model; make one with :func:`load_pipeline`."""

    def __init__(self, bundle: Bundle, *, attention: AttentionImpl = "auto"):
        self.bundle = bundle
        self.attention: AttentionImpl = attention
        self._prepare = jax.jit(partial(_prepare, bundle.graphs, bundle.dtype), static_argnums=0)
        # The noise is donated: its buffer becomes the sample's.
        self._sample = jax.jit(partial(_sample, bundle.graphs, bundle.dtype), static_argnums=0, donate_argnums=2)

    def without_lora(self) -> Pipeline:
        """The base model alone; shares the weights of this pipeline."""
        return Pipeline(self.bundle.without_lora(), attention=self.attention) if self.bundle.has_lora else self

    def resolve(self, settings: Settings) -> Settings:
        """The settings with the model's own number of steps and T5 tokens where they leave these open."""
        return dataclasses.replace(
            settings,
            num_inference_steps=settings.num_inference_steps or self.bundle.default_steps,
            max_sequence_length=settings.max_sequence_length or self.bundle.default_t5_length,
        )

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[Seed],
        conditions: Sequence[Image.Image | None] | None = None,
        reflections: Sequence[str | None] | None = None,
        refined_prompts: Sequence[str | None] | None = None,
        settings: Settings = Settings(),
        on_images: OnImages | None = None,
    ) -> list[Image.Image]:
        """Makes one image for each prompt.

        An image depends on its own prompt, seed, condition and the settings alone. At one batch size it is equal
        bit for bit in any place with any neighbours; between batch sizes it is equal to rounding.

        Args:
            prompts: CLIP is told these, and T5 too where nothing else is said.
            seeds: one a prompt; a tuple such as (seed, prompt, round, branch) is a seed as well.
            conditions: the images to correct, one a prompt; None: plain generation of all.
            reflections: what to change, told to T5.
            refined_prompts: told to T5 in place of the prompt.
            settings: sizes, steps, scales; ``batch_size`` images are made at a time.
            on_images: called after each batch with the index of its first image and its images.

        Raises:
            InputError: lists of different lengths, settings that don't fit the model, or a LoRA that could have no
                effect (it acts on condition tokens and there is no condition).
        """
        samples = _samples(prompts, seeds, conditions, reflections, refined_prompts)
        if samples and self.bundle.has_lora and samples[0].condition is None and not settings.latent_lora:
            raise InputError(
                "the LoRA acts on condition tokens only, and without a condition it has no effect: give a condition, "
                "set latent_lora, or leave the LoRA out"
            )
        images: list[Image.Image] = []
        for batch in self._batches(samples, self.resolve(settings)):
            if on_images:
                on_images(len(images), batch)
            images += batch
        return images

    def _batches(self, samples: list[_Sample], settings: Settings) -> Iterator[list[Image.Image]]:
        """The images of each batch; the next batch is already on its way when one is handed out."""
        size = settings.batch_size
        program = self._program(settings, samples[0].condition is not None) if samples else None
        waiting: tuple[int, Array] | None = None
        for start in range(0, len(samples), size):
            assert program is not None
            chunk = samples[start : start + size]
            padded = chunk + chunk[-1:] * (size - len(chunk))
            noise, given = self._prepare(program, self.bundle.weights, self._inputs(padded, settings))
            _, pixels = self._sample(program, self.bundle.weights, noise, given, self._scales(settings))
            if waiting:
                yield _to_images(*waiting)
            waiting = len(chunk), pixels
        if waiting:
            yield _to_images(*waiting)

    def _program(self, settings: Settings, with_condition: bool) -> Program:
        return Program(
            settings.height,
            settings.width,
            settings.condition_size if with_condition else None,
            self.bundle.token_pixels,
            ConditionFlags(settings.union_cond_attn, settings.add_cond_attn, settings.latent_lora),
            use_image_guidance=with_condition and settings.image_guidance_scale != 1.0,
            use_condition_scale=with_condition and settings.condition_scale != 1.0,
            tiled=settings.vae_tiling,
            attention=self.attention,
        )

    def _inputs(self, samples: list[_Sample], settings: Settings) -> Inputs:
        bundle, size = self.bundle, settings.condition_size
        assert settings.max_sequence_length is not None
        has_condition = samples[0].condition is not None
        return Inputs(
            jnp.asarray(bundle.tokenizers.clip([s.prompt for s in samples], bundle.clip_length)),
            jnp.asarray(bundle.tokenizers.t5([s.t5_text for s in samples], settings.max_sequence_length)),
            sample_keys([s.seed for s in samples]),
            jnp.asarray(np.stack([condition_pixels(s.condition, size) for s in samples if s.condition]))
            if has_condition
            else None,
        )

    def _scales(self, settings: Settings) -> Scales:
        tokens = (settings.height // self.bundle.token_pixels) * (settings.width // self.bundle.token_pixels)
        assert settings.num_inference_steps is not None
        numbers = settings.guidance_scale, settings.condition_scale, settings.image_guidance_scale
        return Scales(
            jnp.asarray(self.bundle.schedule.sigmas(settings.num_inference_steps, tokens)),
            *(jnp.float32(number) for number in numbers),
        )


def load_pipeline(
    model: str,
    *,
    lora: str | None = None,
    lora_alpha: float | None = None,
    dtype: str = "bfloat16",
    attention: AttentionImpl = "auto",
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> Pipeline:
    """Loads a model, and a LoRA onto its transformer.

    Args:
        model: a converted folder, a folder in diffusers' layout, or the id of one on the Hub.
        lora: a LoRA file of any common format, a converted one, a folder that holds one, or the id of one on the Hub.
        lora_alpha: the LoRA's alpha where its file does not say it; the rank if None.
        dtype: of weights and activations: ``bfloat16``, ``float32`` or ``float16``.
        attention: see :func:`rflow_jax.models.attention.attend`.
        mesh: devices to spread the weights over (axes ``fsdp``, ``tensor``); None: all on the first device.
        progress: show a bar while the weights are read.

    Raises:
        InputError: nothing there, not a model, a truncated file, a LoRA for another network.
    """
    use_compilation_cache()
    bundle = load_bundle(model, lora=lora, lora_alpha=lora_alpha, dtype=dtype, mesh=mesh, progress=progress)
    return Pipeline(bundle, attention=attention)


def sample_keys(seeds: Sequence[Seed]) -> Array:
    """One key a seed, [b]; whole numbers of any size, or tuples of them.

    The generator is named, so that neither JAX's defaults nor a seed above 32 bits change a picture.
    """
    data = np.stack([np.frombuffer(_digest(seed), np.uint32, count=2) for seed in seeds])
    return jax.random.wrap_key_data(jnp.asarray(data), impl="threefry2x32")


def _digest(seed: Seed) -> bytes:
    """A hash of the numbers as they are written: no two seeds share it, of whatever size and length."""
    numbers = seed if isinstance(seed, tuple) else (seed,)
    if not numbers or any(not isinstance(number, int) or number < 0 for number in numbers):
        raise InputError(f"a seed must be a whole number from 0, or a tuple of them, not {seed!r}")
    return hashlib.sha256("-".join(map(str, numbers)).encode()).digest()


def _prepare(graphs: Any, dtype: Any, program: Program, weights: Any, inputs: Inputs) -> tuple[Array, Given]:
    """Draws the noise, [b, i, f], and encodes the texts and the condition."""
    _, pooled = nnx.merge(graphs.clip, weights["clip"])(inputs.clip_ids)
    text = nnx.merge(graphs.t5, weights["t5"])(inputs.t5_ids)
    vae = nnx.merge(graphs.vae, weights["vae"])
    factor = vae.config.factor
    grid = (program.height // factor, program.width // factor, vae.config.latent_channels)
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, NOISE), grid))(inputs.keys)
    condition = black = None
    if inputs.condition is not None:
        encode = partial(encode_condition, vae, dtype, program.tiled)
        condition = encode(inputs.condition, inputs.keys, CONDITION)
        if program.use_image_guidance:
            black = encode(jnp.zeros_like(inputs.condition), inputs.keys, BLACK)
    return pack(noise), Given(text.astype(dtype), pooled.astype(dtype), condition, black)


def encode_condition(
    vae: AutoencoderKL, dtype: Any, tiled: bool, pixels: UInt8[Array, "b y x 3"], keys: Array, draw: int
) -> Float[Array, "b c f"]:
    """Condition images -> packed latents, a draw from the posterior each; one image at a time to bound memory."""

    def encode(one: tuple[Array, Array]) -> Array:
        image, key = one
        mean, logvar = vae.encode(to_network_range(image[None]).astype(dtype), tiled=tiled)
        noise = jax.random.normal(jax.random.fold_in(key, draw), mean.shape)
        sample = sample_posterior(mean.astype(jnp.float32), logvar.astype(jnp.float32), noise)
        return pack(vae.scale(sample))[0].astype(dtype)

    return jax.lax.map(encode, (pixels, keys))


def _sample(
    graphs: Any, dtype: Any, program: Program, weights: Any, noise: Array, given: Given, scales: Scales
) -> tuple[Float[Array, "b i f"], UInt8[Array, "b y x 3"]]:
    """Integrates the flow and decodes: (packed latents, pixels)."""
    transformer = nnx.merge(graphs.transformer, *weights["transformer"])
    rope = rope_for(transformer.config, given.text.shape[1], program.image_grid, program.condition_grid)
    x, _ = euler(velocity_of(transformer, dtype, program, given, scales, rope), noise, scales.sigmas)
    vae = nnx.merge(graphs.vae, weights["vae"])
    images = decode_latents(vae, dtype, x, program.image_grid, program.tiled)
    return x, to_pixels(images)


def decode_latents(
    vae: AutoencoderKL, dtype: Any, x: Float[Array, "b i f"], grid: tuple[int, int], tiled: bool
) -> Float[Array, "b y x 3"]:
    """Packed latents -> images, about [-1, 1]; one image at a time to bound memory."""
    latents = unpack(x, *(PATCH * side for side in grid))
    return jax.lax.map(lambda one: vae.decode(vae.unscale(one[None]).astype(dtype), tiled=tiled)[0], latents)


def velocity_of(
    transformer: FluxTransformer, dtype: Any, program: Program, given: Given, scales: Scales, rope: Rope
) -> Callable[[Array, Array, Array], Array]:
    """The velocity field of one batch: the network's, with image guidance where it is asked for.

    It is a function of x and the number of the step; the step's time is in ``scales``.
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
    transformer: FluxTransformer, times: Array, guidance: Array | float, pooled: Array, dtype: Any, ctx: Context
) -> Modulations:
    """The modulations of every step: leaves [steps, b, k, o]."""
    steps, b = times.shape[0], pooled.shape[0]
    guidances = jnp.full(steps * b, guidance, jnp.float32) if transformer.config.guidance_embeds else None
    flat = transformer.modulations(
        jnp.repeat(times, b), guidances, jnp.tile(pooled, (steps, 1)), CONDITION_TIME, dtype, ctx
    )
    return jax.tree.map(lambda vectors: vectors.reshape(steps, b, *vectors.shape[1:]), flat)


def to_network_range(pixels: UInt8[Array, "*b 3"]) -> Float[Array, "*b 3"]:
    """0..255 -> -1..1."""
    return pixels.astype(jnp.float32) / 255.0 * 2.0 - 1.0


def to_pixels(images: Float[Array, "*b 3"]) -> UInt8[Array, "*b 3"]:
    """-1..1 -> 0..255, clipped and rounded."""
    unit = jnp.clip(images.astype(jnp.float32) / 2.0 + 0.5, 0.0, 1.0)
    return jnp.round(unit * 255.0).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class _Sample:
    prompt: str
    t5_text: str
    seed: Seed
    condition: Image.Image | None


def _samples(
    prompts: Sequence[str],
    seeds: Sequence[Seed],
    conditions: Sequence[Image.Image | None] | None,
    reflections: Sequence[str | None] | None,
    refined_prompts: Sequence[str | None] | None,
) -> list[_Sample]:
    nothing = [None] * len(prompts)
    columns = {
        "seeds": seeds,
        "conditions": nothing if conditions is None else conditions,
        "reflections": nothing if reflections is None else reflections,
        "refined_prompts": nothing if refined_prompts is None else refined_prompts,
    }
    for name, column in columns.items():
        if len(column) != len(prompts):
            raise InputError(f"generate: {len(prompts)} prompts but {len(column)} {name}; give one for each prompt")
    without = sum(condition is None for condition in columns["conditions"])
    if 0 < without < len(prompts):
        raise InputError(f"generate: {without} of {len(prompts)} prompts have no condition; generate these apart")
    return [
        _Sample(prompt, t5_prompt(refined or prompt, reflection), seed, condition)
        for prompt, seed, condition, reflection, refined in zip(prompts, *columns.values(), strict=True)
    ]


def _to_images(count: int, pixels: Array) -> list[Image.Image]:
    return [Image.fromarray(array) for array in np.asarray(pixels)[:count]]
