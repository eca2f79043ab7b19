"""Prompt (and an image to correct) -> image: batched and jitted; an image does not depend on its index in a batch."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from rflow_jax.errors import InputError, RunError
from rflow_jax.generation.config import ResolvedSampling, SamplingConfig, require_lora_effect
from rflow_jax.generation.sampling import (
    CHECKED,
    DynamicArgs,
    Inputs,
    PerturbedSeed,
    Sampled,
    Seed,
    StaticArgs,
    draw_noise,
    noise_draws,
    prepare,
    sample,
    sample_keys,
)
from rflow_jax.models.flux.split import split_kernels, splits_kernels
from rflow_jax.models.lora import without_condition_effect
from rflow_jax.models.options import AttentionImpl
from rflow_jax.models.partitioning import DATA
from rflow_jax.parallel.mesh import traced_on
from rflow_jax.parallel.programs import SharedProgram, turn
from rflow_jax.parallel.runtime import reproducible, use_compilation_cache
from rflow_jax.tokenizers.flux import t5_prompt
from rflow_jax.typing import Array
from rflow_jax.utils.images import condition_pixels
from rflow_jax.weights.flux import FluxModel, Weights, load_flux

log = logging.getLogger(__name__)
OnImages = Callable[[int, list[Image.Image]], None]
Made = Image.Image | str  # an image, or why there is none


class NotFiniteError(RunError):
    """Images that do not exist, since some of their numbers are NaN or infinite.

    Attributes:
        failed: index of the image -> why.
    """

    def __init__(self, failed: Mapping[int, str], count: int) -> None:
        first = min(failed)
        super().__init__(
            f"{len(failed)} of {count} images could not be made, such as number {first + 1}: {failed[first]}"
        )
        self.failed = failed


@dataclasses.dataclass(frozen=True)
class Request:
    """The inputs of one image.

    Attributes:
        prompt: for CLIP, and for T5 unless there is a refined prompt.
        seed: a number, a tuple such as (seed, prompt, round, branch), or a perturbation of another seed's noise.
        condition: the image to correct.
        reflection: what to change; part of T5's text.
        refined_prompt: for T5 in place of the prompt.
    """

    prompt: str
    seed: Seed | PerturbedSeed
    condition: Image.Image | None = None
    reflection: str | None = None
    refined_prompt: str | None = None

    @property
    def t5_text(self) -> str:
        """T5's prompt."""
        return t5_prompt(self.refined_prompt or self.prompt, self.reflection)

    @property
    def key_seed(self) -> Seed:
        """The seed of all draws but the noise."""
        return self.seed.path[-1] if isinstance(self.seed, PerturbedSeed) else self.seed


@dataclasses.dataclass(frozen=True)
class Pending:
    """A dispatched batch, which the devices may still be computing."""

    count: int
    sampled: Sampled

    def images(self) -> list[Made]:
        """Waits for the images; instead of one with numbers that are NaN or infinite, says which they are."""
        pixels, finite = (_whole(rows)[: self.count] for rows in (self.sampled.pixels, self.sampled.finite))
        made: list[Made] = []
        for array, known in zip(pixels, finite, strict=True):
            broken = [what for what, sound in zip(CHECKED, known, strict=True) if not sound]
            made.append(f"{broken[0]} became NaN or infinite" if broken else Image.fromarray(array))
        return made


def _whole(rows: Array) -> np.ndarray:
    """All rows of a batch; with several processes no process has all of it."""
    return np.asarray(rows if rows.is_fully_addressable else multihost_utils.process_allgather(rows, tiled=True))


class Pipeline:
    """A loaded model; make one with :func:`load_pipeline`.

    With a mesh whose axis ``data`` has several devices, a batch is ``batch_size`` images on each of them, and every
    device computes its own images independently.

    Attributes:
        prepare, sample: the compiled programs, see :mod:`rflow_jax.generation.sampling`.
    """

    def __init__(self, bundle: FluxModel, *, attention: AttentionImpl = "auto", mesh: jax.sharding.Mesh | None = None):
        self.bundle = bundle
        self.attention: AttentionImpl = attention
        self.mesh = mesh
        self._warned_idle = False
        self._draw = SharedProgram(draw_noise, static_argnums=(0, 1))
        self.prepare = SharedProgram(self._on_each(prepare, 1), static_argnums=0)
        # The noise is donated: its buffer becomes the sample's.
        self.sample = SharedProgram(self._on_each(sample, 2), static_argnums=0, donate_argnums=2)

    def _on_each(self, function: Callable, batched: int) -> Callable:
        """Runs a function on every device of the axis ``data``, on its rows of the first ``batched`` arguments."""
        function = partial(function, self.bundle.graphs, self.bundle.dtype)
        if self.replicas == 1:
            return traced_on(self.mesh, function)
        mesh, rows, whole = self.mesh, PartitionSpec(DATA), PartitionSpec()

        def spread(program: StaticArgs, weights: Weights, *rest: Any) -> Any:
            specs = (whole, *[rows] * batched, *[whole] * (len(rest) - batched))
            mapped = jax.shard_map(
                partial(function, program), in_specs=specs, out_specs=rows, axis_names={DATA}, check_vma=False
            )
            return mapped(weights, *rest)

        return traced_on(mesh, spread)

    @property
    def replicas(self) -> int:
        """The number of devices that each make images of their own."""
        return 1 if self.mesh is None else self.mesh.shape.get(DATA, 1)

    def images_at_once(self, settings: SamplingConfig) -> int:
        """Images of one batch, over all devices."""
        return settings.batch_size * self.replicas

    def without_lora(self) -> Pipeline:
        """The base model with the weights of this pipeline. The same object each time: it compiles once."""
        return self._bare if self.bundle.has_lora else self

    def with_weights(self, weights: Weights) -> Pipeline:
        """The model of this pipeline with other weights of the same shapes and dtypes; shares the compiled programs."""
        pipe = copy.copy(self)
        pipe.bundle = dataclasses.replace(self.bundle, weights=weights)
        pipe.__dict__.pop("_bare", None)  # it has the weights of this one
        return pipe

    @cached_property
    def _bare(self) -> Pipeline:
        return Pipeline(self.bundle.without_lora(), attention=self.attention, mesh=self.mesh)

    def resolve(self, settings: SamplingConfig) -> ResolvedSampling:
        """The settings with the model's own sizes, steps and so on where there are none."""
        return settings.resolve(self.bundle.defaults)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[Seed | PerturbedSeed],
        conditions: Sequence[Image.Image | None] | None = None,
        reflections: Sequence[str | None] | None = None,
        refined_prompts: Sequence[str | None] | None = None,
        settings: SamplingConfig = SamplingConfig(),
        on_images: OnImages | None = None,
    ) -> list[Image.Image]:
        """Makes one image for each prompt.

        An image depends only on its own prompt, seed, condition and the settings. At one batch size it is equal bit for
        bit at any index with any neighbours; between batch sizes it is equal up to rounding.

        Args:
            prompts: for CLIP, and for T5 unless there is a refined prompt.
            seeds: one per prompt; a tuple such as (seed, prompt, round, branch) is a seed as well.
            conditions: the images to correct, one per prompt; None: plain generation of all.
            reflections: what to change; part of T5's text.
            refined_prompts: for T5 in place of the prompt.
            settings: sizes, steps, scales, the model's own by default; ``batch_size`` images are made at a time.
            on_images: called after each batch with the index of its first image and its images; several times for a
                batch in which one fails, with the images between.

        Raises:
            NotFiniteError: the numbers of an image are NaN or infinite. All others are made before.
            InputError: lists of different lengths, settings that don't fit the model, or a LoRA without any effect (it
                acts on condition tokens only, and there are none, or none of its linears sees them).
        """
        if isinstance(prompts, str):
            raise InputError(f"generate: prompts is the text {prompts[:40]!r}; give a list of prompts")
        nothing = [None] * len(prompts)
        columns: dict[str, Sequence[Any]] = {
            "seeds": seeds,
            "conditions": nothing if conditions is None else conditions,
            "reflections": nothing if reflections is None else reflections,
            "refined_prompts": nothing if refined_prompts is None else refined_prompts,
        }
        for name, column in columns.items():
            if len(column) != len(prompts):
                raise InputError(f"generate: {len(prompts)} prompts but {len(column)} {name}; give one for each prompt")
        requests = [Request(*row) for row in zip(prompts, *columns.values(), strict=True)]
        self._check(requests, settings)
        made: list[Made] = []
        for batch in self._batches(requests, settings):
            for first, images in _runs(batch, len(made)):
                if on_images:
                    on_images(first, images)
            made += batch
        if failed := {index: reason for index, reason in enumerate(made) if isinstance(reason, str)}:
            raise NotFiniteError(failed, len(made))
        return [image for image in made if not isinstance(image, str)]

    def start(self, requests: Sequence[Request], settings: SamplingConfig) -> Pending:
        """Dispatches one batch and returns at once; fewer requests than a full batch cost as much.

        Raises:
            InputError: as :meth:`generate`.
        """
        self._check(requests, settings)
        return self._dispatch(requests, settings)

    def _dispatch(self, requests: Sequence[Request], settings: SamplingConfig) -> Pending:
        size = self.images_at_once(settings)
        if not 0 < len(requests) <= size:
            raise ValueError(f"a batch has 1 to {size} requests, not {len(requests)}")
        padded = [*requests, *[requests[-1]] * (size - len(requests))]
        resolved, factor = self.resolve(settings), self.bundle.vae_config.factor
        program = self.program_of(resolved, requests[0].condition is not None)
        inputs, scales = self._inputs(padded, resolved), self._scales(resolved)
        grid = resolved.height // factor, resolved.width // factor, self.bundle.vae_config.latent_channels
        with turn(), reproducible(self.bundle.dtype):
            noise = self._draw(program, grid, self._put(noise_draws([request.seed for request in padded])))
            given = self.prepare(program, self.bundle.weights, self._put(inputs))
            return Pending(len(requests), self.sample(program, self.bundle.weights, noise, given, scales))

    def _put(self, rows: Any) -> Any:
        """Puts arrays with one row per image on the devices that compute the rows."""
        if self.replicas == 1:
            return rows
        assert self.mesh is not None
        return jax.device_put(rows, NamedSharding(self.mesh, PartitionSpec(DATA)))

    def _check(self, requests: Sequence[Request], settings: SamplingConfig) -> None:
        unit, resolved = self.bundle.token_pixels, self.resolve(settings)
        for name in ("height", "width", "condition_size"):
            if (size := getattr(resolved, name)) % unit:
                raise InputError(f"{name} is {size}: {self.bundle.name} makes images in multiples of {unit} pixels")
        without = sum(request.condition is None for request in requests)
        if 0 < without < len(requests):
            raise InputError(f"generate: {without} of {len(requests)} prompts have no condition; generate these apart")
        if requests and self.bundle.has_lora:
            self._require_lora_effect(settings, with_condition=not without)

    def _require_lora_effect(self, settings: SamplingConfig, with_condition: bool) -> None:
        require_lora_effect(settings, with_condition)
        if settings.latent_lora:
            return
        paths = self.bundle.lora_paths
        idle, unread = without_condition_effect(paths, self.bundle.flux_config.num_single_layers)
        if len(idle) + len(unread) == len(paths):
            raise InputError(
                f"the LoRA acts on condition tokens only, and its {len(paths)} adapters, such as {paths[0]}, change "
                "nothing there that the image sees: set latent_lora, or leave the LoRA out"
            )
        if idle and not self._warned_idle:
            self._warned_idle = True
            log.warning(
                "%d of the LoRA's %d adapters have no effect without latent_lora: no condition token passes through "
                "their linears, such as %s",
                *(len(idle), len(paths), idle[0]),
            )

    def _batches(self, requests: list[Request], settings: SamplingConfig) -> Iterator[list[Made]]:
        """The images of each batch; the next batch is already dispatched when one is yielded."""
        size = self.images_at_once(settings)
        waiting: Pending | None = None
        for first in range(0, len(requests), size):
            started = self._dispatch(requests[first : first + size], settings)
            if waiting:
                yield waiting.images()
            waiting = started
        if waiting:
            yield waiting.images()

    def program_of(self, settings: ResolvedSampling, with_condition: bool) -> StaticArgs:
        """The static arguments of the compiled programs."""
        return StaticArgs(
            settings.height,
            settings.width,
            settings.condition_size if with_condition else None,
            self.bundle.token_pixels,
            settings.flags,
            use_image_guidance=with_condition and settings.image_guidance_scale != 1.0,
            use_condition_scale=with_condition and settings.condition_scale != 1.0,
            tiled=settings.vae_tiling,
            attention=self.attention,
        )

    def _inputs(self, samples: list[Request], settings: ResolvedSampling) -> Inputs:
        tokenizers, condition = self.bundle.tokenizers, None
        if samples[0].condition is not None:
            pixels = [condition_pixels(s.condition, settings.condition_size) for s in samples if s.condition]
            condition = jnp.asarray(np.stack(pixels))
        return Inputs(
            jnp.asarray(tokenizers.clip([s.prompt for s in samples], self.bundle.clip_length)),
            jnp.asarray(tokenizers.t5([s.t5_text for s in samples], settings.max_sequence_length)),
            sample_keys([s.key_seed for s in samples]),
            condition,
        )

    def _scales(self, settings: ResolvedSampling) -> DynamicArgs:
        tokens = (settings.height // self.bundle.token_pixels) * (settings.width // self.bundle.token_pixels)
        numbers = settings.guidance_scale, settings.condition_scale, settings.image_guidance_scale
        return DynamicArgs(
            jnp.asarray(self.bundle.schedule.sigmas(settings.num_inference_steps, tokens)),
            *(jnp.float32(number) for number in numbers),
        )


def _runs(batch: Sequence[Made], first: int) -> Iterator[tuple[int, list[Image.Image]]]:
    """(index, images) of each run of images without a failed one between; ``first`` is the index of the batch."""
    begin = 0
    for end in range(len(batch) + 1):
        if end == len(batch) or isinstance(batch[end], str):
            if run := [image for image in batch[begin:end] if not isinstance(image, str)]:
                yield first + begin, run
            begin = end + 1


def load_pipeline(
    model: str,
    *,
    lora: str | None = None,
    lora_alpha: float | None = None,
    dtype: str = "bfloat16",
    attention: AttentionImpl = "auto",
    mesh: jax.sharding.Mesh | None = None,
    scan_blocks: bool | None = None,
    progress: bool = True,
) -> Pipeline:
    """Loads a model, and a LoRA onto its transformer.

    Args:
        model: a converted folder, a folder in diffusers' layout, or the id of one on the Hub.
        lora: a LoRA file of any common format, a converted one, a folder with one, or the id of one on the Hub.
        lora_alpha: the LoRA's alpha if its file has none; None: the rank.
        dtype: of weights and activations: ``bfloat16`` or ``float32``.
        attention: see :func:`rflow_jax.models.attention.attend`.
        mesh: devices to spread the weights (axes ``fsdp``, ``tensor``), the images (``data``) and the tokens of one
            image (``sequence``) over; None: all on the first device.
        scan_blocks: stack the transformer's blocks, which compiles in a fraction of the time; None: on TPU.
        progress: show a bar while the weights are read.

    Raises:
        InputError: nothing there, not a model, a truncated file, a LoRA for another network.
    """
    use_compilation_cache()
    options = {"dtype": dtype, "mesh": mesh, "scan_blocks": scan_blocks, "progress": progress}
    flux = load_flux(model, lora=lora, lora_alpha=lora_alpha, **options)
    if splits_kernels(mesh, flux.graphs.transformer.scan_blocks):
        base, adapters = flux.weights["transformer"]
        flux.weights["transformer"] = split_kernels(base, flux.flux_config), adapters
    return Pipeline(flux, attention=attention, mesh=mesh)
