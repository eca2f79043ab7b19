"""Recordings 01 to 03: the transformer, its stages and its flags."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.models.flux.config import ConditionFlags
from rflow_jax.models.flux.layers import Rope, rope_table
from rflow_jax.models.flux.transformer import FluxTransformer
from rflow_jax.parity.measure import Recording
from rflow_jax.typing import Array

PLAIN, CONDITIONED, VARIANTS = "01_transformer_nocond", "02_transformer_cond", "03_variants"
Result = tuple[str, Any]


def plain(recording: Recording) -> Iterator[Result]:
    """01: without a condition."""
    inputs = recording.arrays(PLAIN)
    base, corrector = recording.transformer, recording.corrector
    yield "out", (out := _run(base, inputs))
    yield "out_diffusers", out
    yield "out_lora_loaded", _run(corrector, inputs)
    yield "out_lora_latent", _run(corrector, inputs, flags=ConditionFlags(latent_lora=True))


def conditioned(recording: Recording) -> Iterator[Result]:
    """02: with a condition, and every stage on the way."""
    inputs = recording.arrays(CONDITIONED)
    yield from _stages(recording.corrector, inputs)
    yield "out", _run(recording.corrector, inputs)
    yield "out_nolora", _run(recording.transformer, inputs)
    reloaded = recording.transformer_with_lora(recording.meta["lora"]["scale_of_out_reloaded"])
    yield "out_reloaded", _run(reloaded, inputs)


def variants(recording: Recording) -> Iterator[Result]:
    """03: the flags."""
    inputs = recording.arrays(CONDITIONED)
    own = recording.arrays(VARIANTS)
    full = inputs | {
        "in_condition_latents": own["in_condition_latents_full"],
        "in_condition_ids": own["in_condition_ids_full"],
    }
    apart = ConditionFlags(union_cond_attn=False)
    everything = ConditionFlags(union_cond_attn=False, add_cond_attn=True, latent_lora=True)
    corrector = recording.corrector
    yield "out_union_false", _run(corrector, inputs, flags=apart)
    yield "out_latent_lora", _run(corrector, inputs, flags=ConditionFlags(latent_lora=True))
    both = ConditionFlags(union_cond_attn=False, latent_lora=True)
    yield "out_union_false_latent_lora", _run(corrector, inputs, flags=both)
    for match, factor in recording.numbered(VARIANTS, r"in_(c_factor\d+)"):
        yield f"out_{match[1]}", _run(corrector, inputs, condition_scale=jnp.asarray(factor))
        try:  # the pair of condition_scale and union_cond_attn false must be refused
            _run(corrector, inputs, condition_scale=jnp.asarray(factor), flags=apart)
            refused: Any = AssertionError("condition_scale with union_cond_attn false was not refused")
        except InputError:
            refused = None
        yield f"out_{match[1]}_union_false", refused
    yield "out_add_cond_attn", _run(corrector, full, flags=ConditionFlags(add_cond_attn=True))
    yield "out_full_default", _run(corrector, full)
    yield "out_all_flags", _run(corrector, full, flags=everything)
    yield "out_c_t", _run(corrector, inputs, c_t=recording.meta["c_t_of_out_c_t"])


def _run(network: FluxTransformer, inputs: dict[str, np.ndarray], **options: Any) -> Array:
    condition = inputs.get("in_condition_latents")
    return network(
        jnp.asarray(inputs["in_hidden_states"]),
        jnp.asarray(inputs["in_encoder_hidden_states"]),
        jnp.asarray(inputs["in_pooled_projections"]),
        jnp.asarray(inputs["in_timestep"]),
        guidance=_guidance(network, inputs),
        rope=_rope(network, inputs),
        condition=None if condition is None else jnp.asarray(condition),
        **options,
    )


def _stages(network: FluxTransformer, inputs: dict[str, np.ndarray]) -> Iterator[Result]:
    """The network's intermediate results, in the order of its own call."""
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "condition_latents", "timestep")
    latents, text, pooled, condition, t = (jnp.asarray(inputs[f"in_{name}"]) for name in names)
    n_text, n_image, n_condition = text.shape[1], latents.shape[1], condition.shape[1]
    rope = _rope(network, inputs)
    for name, table in zip(("cos", "sin"), rope, strict=True):
        both = np.repeat(np.asarray(table), 2, axis=-1)  # recorded twice: once for each channel of an angle's pair
        yield f"st_rope_{name}", both[: n_text + n_image]
        yield f"st_cond_rope_{name}", both[n_text + n_image :]
    ctx = network.context(n_image, condition, rope, None, ConditionFlags())
    text, image = network.embed_tokens(latents, text, condition, ctx)
    guidance = _guidance(network, inputs)
    vector = network.embed_vectors(t, guidance, pooled, 0.0, latents.dtype, ctx)
    modulations = network.modulations(t, guidance, pooled, 0.0, latents.dtype, ctx)
    yield "st_x_embed", image[:, :n_image]
    yield "st_x_embed_cond", image[:, n_image:]
    yield "st_context_embed", text
    yield "st_temb", vector[:, 0]
    yield "st_cond_temb", vector[:, 1]
    double: Any = network.double_blocks
    single: Any = network.single_blocks
    for k, (block, modulation) in enumerate(zip(double, modulations.double, strict=True)):
        text, image = block(text, image, modulation, ctx)
        yield f"st_double{k}_txt", text
        yield f"st_double{k}_img", image[:, :n_image]
        yield f"st_double{k}_cond", image[:, n_image:]
    x = jnp.concatenate([text, image], axis=1)
    for k, (block, modulation) in enumerate(zip(single, modulations.single, strict=True)):
        x = block(x, modulation, ctx)
        yield f"st_single{k}_txtimg", x[:, :-n_condition]
        yield f"st_single{k}_cond", x[:, -n_condition:]


def _rope(network: FluxTransformer, inputs: dict[str, np.ndarray]) -> Rope:
    ids = [inputs["in_txt_ids"], inputs["in_img_ids"]]
    if "in_condition_ids" in inputs:
        ids.append(inputs["in_condition_ids"])
    return rope_table(np.concatenate(ids), network.config.axes_dims_rope, network.config.rope_theta)


def _guidance(network: FluxTransformer, inputs: dict[str, np.ndarray]) -> Array | None:
    return jnp.asarray(inputs["in_guidance"]) if network.config.guidance_embeds else None
