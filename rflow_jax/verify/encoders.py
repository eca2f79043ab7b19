"""Recordings 04 to 06: autoencoder, text encoders, schedule."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from rflow_jax.flow.latents import image_ids, pack, text_ids
from rflow_jax.flow.schedule import Schedule
from rflow_jax.images import fit_to_grid
from rflow_jax.models.autoencoder import AutoencoderKL, sample_posterior
from rflow_jax.pipeline import to_network_range
from rflow_jax.typing import Array
from rflow_jax.verify.recording import Recording
from rflow_jax.verify.report import INPUT

AUTOENCODER, TEXT, SCHEDULE = "04_vae", "05_text", "06_scheduler"
Result = tuple[str, Any]


def autoencoder(recording: Recording) -> Iterator[Result]:
    """04: the autoencoder, and condition images as tokens."""
    z = recording.arrays(AUTOENCODER)
    bundle = recording.pipeline.bundle
    vae = nnx.merge(bundle.graphs.vae, bundle.weights["vae"])
    mean, logvar = vae.encode(to_network_range(jnp.asarray(z["in_images_uint8"])))
    yield "enc_mean", nchw(mean)
    yield "enc_logvar", nchw(logvar)
    yield "enc_std", nchw(jnp.exp(0.5 * logvar))
    yield "dec", nchw(vae.decode(nhwc(z["in_z"])))
    yield from _tokens(vae, z["in_images_uint8"], z["in_noise"], "")
    yield from _tokens(vae, z["in_cond_uint8"][None], z["in_cond_noise"], "cond_")
    odd = np.asarray(fit_to_grid(Image.fromarray(z["in_odd_uint8"]), bundle.token_pixels))[None]
    yield "odd_preprocessed", nchw(to_network_range(jnp.asarray(odd)))
    yield from _tokens(vae, odd, z["in_odd_noise"], "odd_")


def _tokens(vae: AutoencoderKL, pixels: np.ndarray, noise: np.ndarray, prefix: str) -> Iterator[Result]:
    yield f"{prefix}tokens", image_tokens(vae, pixels, noise)
    rows, columns = noise.shape[2] // 2, noise.shape[3] // 2
    yield f"{prefix}ids", image_ids(rows, columns)


def image_tokens(vae: AutoencoderKL, pixels: np.ndarray, noise: np.ndarray) -> Array:
    """uint8 images [b, y, x, 3] and the posterior's draw [b, z, y/8, x/8] -> packed latents."""
    mean, logvar = vae.encode(to_network_range(jnp.asarray(pixels)))
    return pack(vae.scale(sample_posterior(mean, logvar, nhwc(noise))))


def text(recording: Recording) -> Iterator[Result]:
    """05: tokenizers and text encoders."""
    z, prompts = recording.arrays(TEXT), recording.json("prompts")
    bundle = recording.pipeline.bundle
    clip_ids = bundle.tokenizers.clip(prompts, z["clip_input_ids"].shape[1])
    hidden, pooled = nnx.merge(bundle.graphs.clip, bundle.weights["clip"])(jnp.asarray(clip_ids))
    yield "clip_input_ids", clip_ids
    yield "clip_last_hidden_state", hidden
    yield "clip_pooled", pooled
    lengths = bundle.tokenizers.lengths(prompts)
    yield "clip_untruncated_len", lengths[0]
    yield "t5_untruncated_len", lengths[1]
    t5 = nnx.merge(bundle.graphs.t5, bundle.weights["t5"])
    short = bundle.tokenizers.t5(prompts, z["t5_input_ids"].shape[1])
    yield "t5_input_ids", short
    yield "t5_embeds", t5(jnp.asarray(short))
    yield "text_ids", text_ids(short.shape[1])
    for match, want in recording.numbered(TEXT, r"t5_input_ids_(\d+)"):
        ids = bundle.tokenizers.t5(prompts, want.shape[1])
        yield match[0], ids
        embedded = t5(jnp.asarray(ids))
        for name, first in recording.numbered(TEXT, rf"t5_embeds_{match[1]}_first\d+"):
            yield name[0], embedded[:, : first.shape[1]]


def schedule(recording: Recording) -> Iterator[Result]:
    """06: sigmas and shifts of each picture size."""
    own = recording.pipeline.bundle.schedule
    for match, mu in recording.numbered(SCHEDULE, r"mu_(\w+)"):
        size = match[1]
        tokens = _tokens_of(recording, size)
        if tokens is None or abs(own.mu(tokens) - float(mu)) > 1e-3:
            # A size that the recordings don't name: the shift says which it was, and so is an input.
            tokens = _invert(own, float(mu))
            yield match[0], INPUT
        else:
            yield match[0], np.float64(own.mu(tokens))
        for name, want in recording.numbered(SCHEDULE, rf"(sigmas|timesteps)_{re.escape(size)}_(\d+)"):
            sigmas = own.sigmas(int(name[2]), tokens)
            yield name[0], sigmas if name[1] == "sigmas" else sigmas[:-1] * np.float32(recording_scale(want))


def recording_scale(timesteps: np.ndarray) -> float:
    """Recorded times run to 1000."""
    return 1000.0 if timesteps.max() > 1 else 1.0


def _tokens_of(recording: Recording, size: str) -> int | None:
    """``1024`` is a square picture of as many pixels, ``tiny`` the one of the generation recordings."""
    side = recording.pipeline.bundle.token_pixels
    if size.isdigit():
        return (int(size) // side) ** 2
    if size == "tiny":
        made = recording.json("generate_meta")
        return (made["height"] // side) * (made["width"] // side)
    return None


def _invert(own: Schedule, mu: float) -> int:
    base, slope = own.mu(0), own.mu(1) - own.mu(0)
    return round((mu - base) / slope)


def nchw(x: Array) -> Array:
    """The recordings' layout."""
    return x.transpose(0, 3, 1, 2)


def nhwc(x: np.ndarray) -> Array:
    """Our layout."""
    return jnp.asarray(x).transpose(0, 2, 3, 1)
