"""Recordings 07: whole generations, through the pipeline's own functions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rflow_jax.flow import PATCH, euler, image_ids, text_ids, unpack
from rflow_jax.generation.pipeline import Pipeline
from rflow_jax.generation.sampling import Conditioning, DynamicArgs, StaticArgs, to_pixels, velocity_of
from rflow_jax.models.flux.config import ConditionFlags
from rflow_jax.models.flux.layers import Rope, rope_table
from rflow_jax.parity.encoders import decode, embed, fitted, image_tokens, nchw
from rflow_jax.parity.measure import Recording
from rflow_jax.tokenizers.flux import t5_prompt
from rflow_jax.typing import Array

GENERATION = "07_generate"
STAGES = ("enc_tokens", "latents_steps", "image_raw", "image_uint8")
Result = tuple[str, Any]


def generation(recording: Recording) -> Iterator[Result]:
    """07: every run of ``generate_meta.json`` that is not exempt."""
    meta, z = recording.json("generate_meta"), recording.arrays(GENERATION)
    pipeline = recording.pipeline
    given = _texts(pipeline, meta, images=len(z["in_latents"]))
    yield "prompt_embeds", given.text
    yield "pooled", given.pooled
    for run, options in meta["runs"].items():
        if not recording.is_exempt(f"{GENERATION}/{run}_latents_steps"):
            yield from _or_error(run, _run(pipeline, meta, options, given, z, run))


def _or_error(run: str, results: Iterator[Result]) -> Iterator[Result]:
    """A run that breaks off is an error on each of its missing arrays, and the other runs go on."""
    owed: dict[str, None] = dict.fromkeys(STAGES)
    try:
        for stage, value in results:
            owed.pop(stage, None)
            yield f"{run}_{stage}", value
    except Exception as error:
        yield from ((f"{run}_{stage}", error) for stage in owed)


def _texts(pipeline: Pipeline, meta: dict[str, Any], images: int) -> Conditioning:
    """The one prompt of all images."""
    flux = pipeline.bundle
    clip_ids = flux.tokenizers.clip([meta["prompt"]], flux.clip_length)
    t5_ids = flux.tokenizers.t5([t5_prompt(meta["prompt_2"])], meta["max_sequence_length"])
    _, pooled = embed(nnx.merge(flux.graphs.clip, flux.weights["clip"]), jnp.asarray(clip_ids))
    text = embed(nnx.merge(flux.graphs.t5, flux.weights["t5"]), jnp.asarray(t5_ids))
    return Conditioning(_repeated(text, images), _repeated(pooled, images), None, None)


def _repeated(row: Array, images: int) -> Array:
    """[1, ...] -> [images, ...]."""
    return jnp.broadcast_to(row, (images, *row.shape[1:]))


def _run(
    pipeline: Pipeline, meta: dict, options: dict, given: Conditioning, z: dict[str, np.ndarray], run: str
) -> Iterator[Result]:
    flux, steps = pipeline.bundle, meta["num_inference_steps"]
    conditioned, guided = options["encode_calls"] > 0, options["image_guidance_scale"] != 1
    vae = nnx.merge(flux.graphs.vae, flux.weights["vae"])
    blacks: list[Array] = []  # the tokens of a black condition for every step
    if conditioned:
        pixels = fitted(z["in_cond_uint8"], flux.token_pixels)
        # The posterior's draws: the condition's, then the black image's of every step; [1 + steps, 1, z, y, x].
        per_step = run.endswith("_perstep")
        draws = z["in_perstep_noise"] if per_step else np.stack([z["in_cond_noise"]] * (1 + steps))
        condition = image_tokens(vae, pixels, draws[0])
        blacks = [image_tokens(vae, np.zeros_like(pixels), draw) for draw in draws[1:]]
        calls = [condition, *blacks] if guided else [condition] * options["encode_calls"]
        yield "enc_tokens", jnp.concatenate(calls)
        images = len(z["in_latents"])
        given = given._replace(condition=_repeated(condition, images))
        blacks = [_repeated(black, images) for black in blacks]
    program = StaticArgs(
        meta["height"],
        meta["width"],
        condition_size=None,  # the grids of the recordings need not be square: the rope has the positions of tokens
        token_pixels=flux.token_pixels,
        flags=ConditionFlags(**options["model_config"]),
        use_image_guidance=conditioned and guided,
        use_condition_scale=conditioned and options["condition_scale"] != 1,
    )
    tokens = program.image_grid[0] * program.image_grid[1]
    numbers = options["guidance_scale"], options["condition_scale"], options["image_guidance_scale"]
    scales = DynamicArgs(jnp.asarray(flux.schedule.sigmas(steps, tokens)), *map(jnp.float32, numbers))
    rope = _rope(pipeline, program, given, z)
    black_steps = jnp.stack(blacks) if blacks else None
    trajectory = jax.jit(partial(_sample, pipeline, program, rope))(
        flux.weights, jnp.asarray(z["in_latents"]), given, black_steps, scales
    )
    # Decoded separately from the sampling: one compiled decoder serves all runs.
    raw = decode(vae, vae.unscale(unpack(trajectory[-1], *(PATCH * side for side in program.image_grid))))
    yield "latents_steps", trajectory
    yield "image_raw", nchw(raw)
    pixels = np.asarray(to_pixels(raw))
    yield "image_uint8", pixels[0] if len(pixels) == 1 else pixels


def _sample(
    pipeline: Pipeline,
    program: StaticArgs,
    rope: Rope,
    weights: dict,
    noise: Array,
    given: Conditioning,
    black_steps: Array | None,
    scales: DynamicArgs,
) -> Array:
    """The pipeline's sampling, with a black condition for each step: the latents after every step."""
    flux = pipeline.bundle
    transformer = flux.graphs.transformer.merge(*weights["transformer"])

    def velocity(x: Array, t: Array, step: Array) -> Array:
        black = None if black_steps is None else black_steps[step]
        at_step = given._replace(black=black)
        return velocity_of(transformer, flux.dtype, program, at_step, scales, rope)(x, t, step)

    return euler(velocity, noise, scales.sigmas)[1]


def _rope(pipeline: Pipeline, program: StaticArgs, given: Conditioning, z: dict[str, np.ndarray]) -> Rope:
    config = pipeline.bundle.flux_config
    ids = [text_ids(given.text.shape[1]), image_ids(*program.image_grid)]
    if given.condition is not None:
        side = program.token_pixels
        rows, columns = (pixels // side for pixels in z["in_cond_uint8"].shape[:2])
        row, column = (int(x) for x in z["in_position_delta"])
        ids.append(image_ids(rows, columns, delta=(row, column)))
    return rope_table(np.concatenate(ids), config.axes_dims_rope, config.rope_theta)
