"""The programs of sampling for a search's configuration: noise, encodings, and the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rflow_jax.aot.estimate import autoencoder_flops, flux_bytes
from rflow_jax.aot.models import abstract_bundle, corrector_ranks, read_sizes, whole_of
from rflow_jax.aot.program import AheadProgram, bytes_on_a_device, shaped
from rflow_jax.aot.verifiers import local_models
from rflow_jax.generation.config import ResolvedSampling
from rflow_jax.generation.pipeline import Pipeline
from rflow_jax.generation.sampling import Conditioning, DynamicArgs, Inputs
from rflow_jax.models.flops import encoder_flops, t5_flops
from rflow_jax.models.flux.config import forward_flops
from rflow_jax.models.flux.transformer import abstract_flux
from rflow_jax.models.partitioning import DATA
from rflow_jax.parallel.mesh import make_mesh
from rflow_jax.parallel.runtime import reproducible
from rflow_jax.parallel.sharding import unclaimed
from rflow_jax.search.config import SearchConfig
from rflow_jax.weights import components
from rflow_jax.weights.flux import FluxModel, scans_blocks


def sampling_mesh(config: SearchConfig, devices: Sequence[Any]) -> Mesh:
    """The mesh of the devices that no model of the search claims."""
    roles = (config.verifier, config.reflector, config.refiner)
    claims = [claim for role in roles for claim in role.claimed_devices]
    return make_mesh(config.mesh, unclaimed(claims, devices))


def sampling_programs(
    config: SearchConfig, devices: Sequence[Any], mesh: Mesh, *, blocks: tuple[int, int] | None = None
) -> list[AheadProgram]:
    """What ``rflow`` compiles for this configuration on this mesh: with a condition where there is a LoRA.

    Args:
        devices: of the whole search.
        mesh: see :func:`sampling_mesh`.
        blocks: numbers of double and single blocks, for a quick check.

    Raises:
        InputError: the model or a setting is not usable.
    """
    dtype = getattr(jnp, config.dtype)
    ranks = None
    if config.lora is not None:
        ranks = corrector_ranks(config.lora, abstract_flux(read_sizes(config.model)[0][components.TRANSFORMER.folder]))
    scan_blocks = scans_blocks(config.scan_blocks, mesh)
    flux = abstract_bundle(config.model, mesh, dtype=dtype, scan_blocks=scan_blocks, lora=ranks, blocks=blocks)
    pipe = Pipeline(flux, mesh=mesh)
    settings = pipe.resolve(config.sampling)
    program = pipe.program_of(settings, ranks is not None)
    rows = NamedSharding(mesh, PartitionSpec(DATA) if pipe.replicas > 1 else PartitionSpec())
    whole = NamedSharding(mesh, PartitionSpec())
    inputs, noise, given, scales = _arguments(pipe, settings, rows, whole, with_condition=ranks is not None)
    weights = {name: flux.weights[name] for name in ("transformer", "vae")}

    def lower_prepare() -> Any:
        with reproducible(dtype):
            return pipe.prepare.lower(program, flux.weights, inputs)

    def lower_sample() -> Any:
        with reproducible(dtype):
            return pipe.sample.lower(program, flux.weights, noise, given, scales)

    count, condition = pipe.images_at_once(settings), given.condition
    tokens = (given.text.shape[1], noise.shape[1], 0 if condition is None else condition.shape[1])
    passes = settings.num_inference_steps * (2 if program.use_image_guidance else 1)
    flops = forward_flops(flux.flux_config, text=tokens[0], image=tokens[1], condition=tokens[2])
    vae = autoencoder_flops(flux.vae_config, settings.height, settings.width, decode=True)
    cut, fsdp = mesh.shape["tensor"] * mesh.shape["sequence"], mesh.shape["fsdp"]
    own = settings.batch_size / (fsdp if settings.batch_size % fsdp == 0 else 1)
    traffic = flux_bytes(flux.flux_config, tokens=sum(tokens), samples=own, parts=cut)
    others = _models_beside(config, devices, mesh)
    # The text encoders and the next batch's encodings are resident beside the program that samples.
    beside = bytes_on_a_device({name: flux.weights[name] for name in ("clip", "t5")}) + bytes_on_a_device(given)
    kept = bytes_on_a_device(flux.weights["transformer"]) + bytes_on_a_device(noise)
    encoding = count * _encoder_flops(config, flux, settings)
    return [
        AheadProgram("prepare", lower_prepare, mesh.size, kept + others, encoding),
        AheadProgram(
            "sample",
            lower_sample,
            mesh.size,
            beside + others,
            count * (passes * flops + vae),
            passes * traffic,
            whole_of(weights),
        ),
    ]


def _models_beside(config: SearchConfig, devices: Sequence[Any], mesh: Mesh) -> int:
    """Bytes of the models that judge and write on a device of the mesh: they share the first one."""
    own = set(mesh.devices.flat)
    return sum(bytes_on_a_device(one.weights) for one in local_models(config, devices) if own & set(one.devices))


def _arguments(
    pipe: Pipeline, settings: ResolvedSampling, rows: Any, whole: Any, *, with_condition: bool
) -> tuple[Inputs, Any, Conditioning, DynamicArgs]:
    """The arguments of the programs, as shapes."""
    flux, b = pipe.bundle, pipe.images_at_once(settings)
    length, side = settings.max_sequence_length, settings.condition_size
    sizes, pixels, steps = flux.flux_config, flux.token_pixels, settings.num_inference_steps
    images = shaped((b, side, side, 3), np.uint8, rows) if with_condition else None
    clip, t5 = (shaped((b, count), np.int32, rows) for count in (flux.clip_length, length))
    key_type = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")).dtype
    inputs: Any = Inputs(clip, t5, shaped((b,), key_type, rows), images)  # pyright: ignore[reportArgumentType]
    tokens = (settings.height // pixels) * (settings.width // pixels)
    noise = shaped((b, tokens, sizes.in_channels), jnp.float32, rows)
    condition = shaped((b, (side // pixels) ** 2, sizes.in_channels), flux.dtype, rows) if with_condition else None
    text = shaped((b, length, sizes.joint_attention_dim), flux.dtype, rows)
    pooled = shaped((b, sizes.pooled_projection_dim), flux.dtype, rows)
    black = condition if with_condition and settings.image_guidance_scale != 1.0 else None
    given: Any = Conditioning(text, pooled, condition, black)  # pyright: ignore[reportArgumentType]
    number = shaped((), jnp.float32, whole)
    scales: Any = DynamicArgs(shaped((steps + 1,), jnp.float32, whole), number, number, number)  # pyright: ignore[reportArgumentType]
    return inputs, noise, given, scales


def _encoder_flops(config: SearchConfig, flux: FluxModel, settings: ResolvedSampling) -> float:
    """Operations of T5, CLIP and the condition's encoder for one image."""
    t5 = read_sizes(config.model)[0][components.T5.folder]
    texts = t5_flops(t5, settings.max_sequence_length) + encoder_flops(flux.clip_config, flux.clip_length)
    if config.lora is None:
        return texts
    return texts + autoencoder_flops(flux.vae_config, settings.condition_size, settings.condition_size, decode=False)
