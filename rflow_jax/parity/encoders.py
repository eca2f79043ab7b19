"""Recordings 04 to 06: autoencoder, text encoders, schedule."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from rflow_jax.flow import Schedule, image_ids, pack, text_ids
from rflow_jax.generation.sampling import to_network_range
from rflow_jax.models.autoencoder import AutoencoderKL, sample_posterior
from rflow_jax.parity.measure import INPUT, Recording
from rflow_jax.typing import Array
from rflow_jax.utils.images import fit_to_grid

AUTOENCODER, TEXT, SCHEDULE = "04_vae", "05_text", "06_scheduler"
WHOLE = 0.01  # tokens; the rounding of a float32 shift is far less
Result = tuple[str, Any]


def autoencoder(recording: Recording) -> Iterator[Result]:
    """04: the autoencoder, and condition images as tokens."""
    z = recording.arrays(AUTOENCODER)
    flux = recording.pipeline.bundle
    vae = nnx.merge(flux.graphs.vae, flux.weights["vae"])
    mean, logvar = _encode(vae, to_network_range(jnp.asarray(z["in_images_uint8"])))
    yield "enc_mean", nchw(mean)
    yield "enc_logvar", nchw(logvar)
    yield "enc_std", nchw(jnp.exp(0.5 * logvar))
    yield "dec", nchw(decode(vae, nhwc(z["in_z"])))
    yield from _tokens(vae, z["in_images_uint8"], z["in_noise"], "")
    yield from _tokens(vae, fitted(z["in_cond_uint8"], flux.token_pixels), z["in_cond_noise"], "cond_")
    odd = fitted(z["in_odd_uint8"], flux.token_pixels)
    yield "odd_preprocessed", nchw(to_network_range(jnp.asarray(odd)))
    yield from _tokens(vae, odd, z["in_odd_noise"], "odd_")


def _tokens(vae: AutoencoderKL, pixels: np.ndarray, noise: np.ndarray, prefix: str) -> Iterator[Result]:
    yield f"{prefix}tokens", image_tokens(vae, pixels, noise)
    rows, columns = noise.shape[2] // 2, noise.shape[3] // 2
    yield f"{prefix}ids", image_ids(rows, columns)


def image_tokens(vae: AutoencoderKL, pixels: np.ndarray, noise: np.ndarray) -> Array:
    """uint8 images [b, y, x, 3] and the posterior's draw [b, z, y/8, x/8] -> packed latents."""
    mean, logvar = _encode(vae, to_network_range(jnp.asarray(pixels)))
    return pack(vae.scale(sample_posterior(mean, logvar, nhwc(noise))))


def fitted(pixels: np.ndarray, grid: int) -> np.ndarray:
    """A picture [y, x, 3] as the network gets it: [1, y, x, 3], sides cut down to multiples of ``grid``."""
    return np.asarray(fit_to_grid(Image.fromarray(pixels), grid))[None]


# Compiled whole: op by op they would take most of the time of all checks together.
def _compiled(method: Callable[[Any, Array], Any]) -> Callable[[Any, Array], Any]:
    run = jax.jit(lambda graph, state, x: method(nnx.merge(graph, state), x), static_argnums=0)
    return lambda network, x: run(*nnx.split(network), x)


_encode = _compiled(lambda vae, images: vae.encode(images))
decode = _compiled(lambda vae, latents: vae.decode(latents))
embed = _compiled(lambda encoder, ids: encoder(ids))


def text(recording: Recording) -> Iterator[Result]:
    """05: tokenizers and text encoders."""
    z, prompts = recording.arrays(TEXT), recording.json("prompts")
    flux = recording.pipeline.bundle
    clip_ids = flux.tokenizers.clip(prompts, z["clip_input_ids"].shape[1])
    hidden, pooled = embed(nnx.merge(flux.graphs.clip, flux.weights["clip"]), jnp.asarray(clip_ids))
    yield "clip_input_ids", clip_ids
    yield "clip_last_hidden_state", hidden
    yield "clip_pooled", pooled
    lengths = flux.tokenizers.lengths(prompts)
    yield "clip_untruncated_len", lengths[0]
    yield "t5_untruncated_len", lengths[1]
    t5 = nnx.merge(flux.graphs.t5, flux.weights["t5"])
    short = flux.tokenizers.t5(prompts, z["t5_input_ids"].shape[1])
    yield "t5_input_ids", short
    yield "t5_embeds", embed(t5, jnp.asarray(short))
    yield "text_ids", text_ids(short.shape[1])
    for match, want in recording.numbered(TEXT, r"t5_input_ids_(\d+)"):
        ids = flux.tokenizers.t5(prompts, want.shape[1])
        yield match[0], ids
        embedded = embed(t5, jnp.asarray(ids))
        for name, first in recording.numbered(TEXT, rf"t5_embeds_{match[1]}_first\d+"):
            yield name[0], embedded[:, : first.shape[1]]


def schedule(recording: Recording) -> Iterator[Result]:
    """06: sigmas and shifts of each picture size."""
    own = recording.pipeline.bundle.schedule
    for match, mu in recording.numbered(SCHEDULE, r"mu_(\w+)"):
        size = match[1]
        tokens, known = _tokens_of(recording, size, own, float(mu))
        yield match[0], np.float64(own.mu(tokens)) if known else INPUT
        for name, want in recording.numbered(SCHEDULE, rf"(sigmas|timesteps)_{re.escape(size)}_(\d+)"):
            sigmas = own.sigmas(int(name[2]), tokens)
            yield name[0], sigmas if name[1] == "sigmas" else sigmas[:-1] * np.float32(recording_scale(want))


def recording_scale(timesteps: np.ndarray) -> float:
    """Recorded times run to 1000."""
    return 1000.0 if timesteps.max() > 1 else 1.0


def _tokens_of(recording: Recording, size: str, own: Schedule, mu: float) -> tuple[int, bool]:
    """Image tokens of a size's name, and whether they follow from the name or only from the recorded shift.

    ``1024`` is a square image of 1024 pixels a side, ``tiny`` the one of the generation recordings. If that does not
    give the recorded shift, and that is the shift of a whole number of tokens, it was another image.
    """
    side, named = recording.pipeline.bundle.token_pixels, None
    if size.isdigit():
        named = (int(size) // side) ** 2
    elif size == "tiny":
        meta = recording.json("generate_meta")
        named = (meta["height"] // side) * (meta["width"] // side)
    base, slope = own.mu(0), own.mu(1) - own.mu(0)
    from_shift = (mu - base) / slope if slope else 0.0
    if named is None or (abs(from_shift - named) > 0.5 and abs(from_shift - round(from_shift)) < WHOLE):
        return round(from_shift), False
    return named, True


def nchw(x: Array) -> Array:
    """The recordings' layout."""
    return x.transpose(0, 3, 1, 2)


def nhwc(x: np.ndarray) -> Array:
    """Our layout."""
    return jnp.asarray(x).transpose(0, 2, 3, 1)
