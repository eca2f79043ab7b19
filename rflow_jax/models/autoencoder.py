"""FLUX's autoencoder: pictures to latents and back, whole or in overlapping tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from rflow_jax.errors import InputError
from rflow_jax.models.convolution import Conv, GroupNorm, upsample_nearest
from rflow_jax.models.layers import Linear
from rflow_jax.typing import Array, Float

OVERLAP = 0.25  # of a tile's side


def apply_tiled(
    network: Callable[[Array], Array], x: Float[Array, "b height width c"], *, tile_in: int, tile_out: int
) -> Float[Array, "b height2 width2 o"]:
    """``network`` over overlapping tiles of ``x``.

    Tiles of one shape run one after the other through one compiled body (there are few shapes), so that the
    peak of memory is that of one tile.

    Args:
        network: [b, h, w, c] -> [b, h * tile_out / tile_in, w * tile_out / tile_in, o].
        tile_in, tile_out: the side of a tile before and after the network.
    """
    step = int(tile_in * (1 - OVERLAP))
    blend = int(tile_out * OVERLAP)
    tiles = [
        [x[:, top : top + tile_in, left : left + tile_in] for left in range(0, x.shape[2], step)]
        for top in range(0, x.shape[1], step)
    ]
    return _assemble(_run(network, tiles), blend, keep=tile_out - blend)


def _run(network: Callable[[Array], Array], tiles: list[list[Array]]) -> list[list[Array]]:
    indices: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for row, line in enumerate(tiles):
        for column, tile in enumerate(line):
            indices.setdefault(tile.shape, []).append((row, column))
    results = [list(line) for line in tiles]
    for same_shape in indices.values():
        done = jax.lax.map(network, jnp.stack([tiles[row][column] for row, column in same_shape]))
        for index, (row, column) in enumerate(same_shape):
            results[row][column] = done[index]
    return results


def _assemble(tiles: list[list[Array]], blend: int, keep: int) -> Array:
    lines: list[Array] = []
    above: list[Array] = []
    for line in tiles:
        blended: list[Array] = []
        for column, tile in enumerate(line):
            faded = _fade(above[column], tile, blend, axis=1) if above else tile
            blended.append(_fade(blended[-1], faded, blend, axis=2) if blended else faded)
        lines.append(jnp.concatenate([tile[:, :keep, :keep] for tile in blended], axis=2))
        above = blended
    return jnp.concatenate(lines, axis=1)


def _fade(before: Array, tile: Array, blend: int, axis: int) -> Array:
    """Blends the first ``blend`` lines of ``tile`` linearly with the last lines of its neighbour."""
    blend = min(before.shape[axis], tile.shape[axis], blend)
    if blend == 0:
        return tile
    weight = jnp.arange(blend, dtype=jnp.float32) / blend
    weight = jnp.expand_dims(weight, tuple(k for k in range(tile.ndim) if k != axis))
    end = before.shape[axis]
    tail = jax.lax.slice_in_dim(before, end - blend, end, axis=axis)
    head = jax.lax.slice_in_dim(tile, 0, blend, axis=axis)
    rest = jax.lax.slice_in_dim(tile, blend, tile.shape[axis], axis=axis)
    faded = tail * (1 - weight) + head * weight
    return jnp.concatenate([faded.astype(tile.dtype), rest], axis=axis)


# Queries of the mid attention that are scored at once. At 1024 px there are 16,384 of them, and all scores
# together would take 1 GiB per image.
QUERIES_AT_ONCE = 1024
LOGVAR_RANGE = (-30.0, 20.0)

# The defaults of diffusers for values missing in vae/config.json; not FLUX's values.
_DEFAULTS: dict[str, Any] = {
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "latent_channels": 4,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes, in the names of diffusers' ``vae/config.json``; the defaults are FLUX.1's.

    Attributes:
        scaling_factor, shift_factor: the transformer's latents are ``(latents - shift_factor) * scaling_factor``.
        sample_size: side of a tile in pixels, and the size above which tiling begins.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    latent_channels: int = 16
    sample_size: int = 1024
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    mid_block_add_attention: bool = True
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False

    def __post_init__(self) -> None:
        if bad := [c for c in self.block_out_channels if c % self.norm_num_groups]:
            raise InputError(
                f"vae config: norm_num_groups {self.norm_num_groups} does not divide {bad} of block_out_channels"
            )

    @property
    def factor(self) -> int:
        """Pixels along the side of one latent."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> AutoencoderConfig:
        """From the content of a diffusers ``vae/config.json``.

        Raises:
            InputError: another network, or a variant of this one that FLUX does not use.
        """
        _refuse_variants(config)
        known = _DEFAULTS | {key: config[key] for key in cls.__dataclass_fields__ if key in config}
        known["block_out_channels"] = tuple(known["block_out_channels"])
        known["shift_factor"] = known["shift_factor"] or 0.0
        size = known["sample_size"]
        sides = {*size} if isinstance(size, list | tuple) else {size}
        if len(sides) != 1:
            raise InputError(f"vae config: sample_size {list(size)} is not a square")
        known["sample_size"] = int(sides.pop())
        return cls(**known)


def _refuse_variants(config: Mapping[str, Any]) -> None:
    if (name := config.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise InputError(f"vae config: a {name}; only AutoencoderKL is supported")
    if (act := config.get("act_fn", "silu")) not in ("silu", "swish"):
        raise InputError(f"vae config: act_fn {act!r} is not supported, only 'silu'")
    for key in ("latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise InputError(f"vae config: {key} is not supported, only scaling_factor and shift_factor")
    levels = len(config.get("block_out_channels", _DEFAULTS["block_out_channels"]))
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        got = config.get(key, [kind] * levels)
        if not isinstance(got, list | tuple) or list(got) != [kind] * levels:
            raise InputError(f"vae config: {key} must be {levels} times {kind!r}, got {got}")


class AutoencoderKL(nnx.Module):
    """Images <-> latents, ``config.factor`` times smaller along each side.

    The network computes in the dtype of its input, norms and softmax in float32. Decoding takes its memory at
    the full resolution ([1024, 1024, 256] in the last stage at 1024 px), so decode a large batch image by
    image (``jax.lax.map``) and pictures beyond ``config.sample_size`` with ``tiled=True``.

    Source: diffusers ``models/autoencoders/autoencoder_kl.py``.
    """

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        z = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, rngs=rngs, dtype=dtype)
        self.decoder = Decoder(config, rngs=rngs, dtype=dtype)
        quant = Conv(2 * z, 2 * z, 1, rngs=rngs, dtype=dtype) if config.use_quant_conv else None
        post_quant = Conv(z, z, 1, rngs=rngs, dtype=dtype) if config.use_post_quant_conv else None
        self.quant_conv = nnx.data(quant)
        self.post_quant_conv = nnx.data(post_quant)

    def encode(
        self, images: Float[Array, "b height width 3"], *, tiled: bool = False
    ) -> tuple[Float[Array, "b y x z"], Float[Array, "b y x z"]]:
        """The posterior of the latents, as (mean, log variance clamped to [-30, 20]).

        Args:
            images: in [-1, 1]; sides are cut down to multiples of ``config.factor``.
            tiled: work in tiles if a side is longer than ``config.sample_size``.

        Raises:
            InputError: tiles that do not fall on whole latents.
        """
        size = self.config.sample_size
        if tiled and max(images.shape[1:3]) > size:
            self._check_tiles()
            moments = apply_tiled(self._moments, images, tile_in=size, tile_out=size // self.config.factor)
        else:
            moments = self._moments(images)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, z: Float[Array, "b y x z"], *, tiled: bool = False) -> Float[Array, "b height width 3"]:
        """Images, about [-1, 1] and not clipped, of unscaled latents (see :meth:`unscale`).

        Args:
            tiled: work in tiles if the image is larger than ``config.sample_size``.

        Raises:
            InputError: tiles that do not fall on whole latents.
        """
        size = self.config.sample_size
        if tiled and max(z.shape[1:3]) > size // self.config.factor:
            self._check_tiles()
            return apply_tiled(self._image, z, tile_in=size // self.config.factor, tile_out=size)
        return self._image(z)

    def scale(self, z: Float[Array, "*b z"]) -> Float[Array, "*b z"]:
        """The autoencoder's latents -> the transformer's."""
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def unscale(self, z: Float[Array, "*b z"]) -> Float[Array, "*b z"]:
        """The transformer's latents -> the autoencoder's."""
        return z / self.config.scaling_factor + self.config.shift_factor

    def _moments(self, images: Array) -> Array:
        moments = self.encoder(images)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def _image(self, z: Array) -> Array:
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def _check_tiles(self) -> None:
        unit = 4 * self.config.factor
        if self.config.sample_size % unit:
            raise InputError(f"vae config: tiling needs sample_size {self.config.sample_size} to divide by {unit}")


def sample_posterior(
    mean: Float[Array, "*b z"], logvar: Float[Array, "*b z"], noise: Float[Array, "*b z"]
) -> Float[Array, "*b z"]:
    """``mean + std * noise`` with standard normal ``noise``."""
    return mean + jnp.exp(0.5 * logvar) * noise


class Encoder(nnx.Module):
    """[b, height, width, 3] -> mean and log variance, [b, height / factor, width / factor, 2 z]."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        channels = config.block_out_channels
        inputs = (channels[0], *channels[:-1])
        last = len(channels) - 1
        self.conv_in = Conv(config.in_channels, channels[0], 3, rngs=rngs, dtype=dtype)
        self.down = nnx.List(
            DownStage(c_in, c_out, config, downsample=level < last, rngs=rngs, dtype=dtype)
            for level, (c_in, c_out) in enumerate(zip(inputs, channels, strict=True))
        )
        self.mid = MidStage(channels[-1], config, rngs=rngs, dtype=dtype)
        self.norm_out = GroupNorm(channels[-1], config.norm_num_groups, dtype=dtype)
        self.conv_out = Conv(channels[-1], 2 * config.latent_channels, 3, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b y x o"]:
        x = self.conv_in(x)
        for stage in self.down:
            x = stage(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    """[b, y, x, z] -> [b, factor * y, factor * x, 3]; ``up.0`` works at the lowest resolution."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        channels = config.block_out_channels[::-1]
        inputs = (channels[0], *channels[:-1])
        last = len(channels) - 1
        self.conv_in = Conv(config.latent_channels, channels[0], 3, rngs=rngs, dtype=dtype)
        self.mid = MidStage(channels[0], config, rngs=rngs, dtype=dtype)
        self.up = nnx.List(
            UpStage(c_in, c_out, config, upsample=level < last, rngs=rngs, dtype=dtype)
            for level, (c_in, c_out) in enumerate(zip(inputs, channels, strict=True))
        )
        self.norm_out = GroupNorm(channels[-1], config.norm_num_groups, dtype=dtype)
        self.conv_out = Conv(channels[-1], config.out_channels, 3, rngs=rngs, dtype=dtype)

    def __call__(self, z: Float[Array, "b y x z"]) -> Float[Array, "b height width c"]:
        x = self.mid(self.conv_in(z))
        for stage in self.up:
            x = stage(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class DownStage(nnx.Module):
    """Residual blocks at one resolution, then half of it."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        config: AutoencoderConfig,
        *,
        downsample: bool,
        rngs: nnx.Rngs,
        dtype: Dtype = jnp.float32,
    ):
        resnets = _resnets(c_in, c_out, config.layers_per_block, config, rngs=rngs, dtype=dtype)
        self.resnets = nnx.List(resnets)
        # Zeros only below and to the right, as in the original.
        below = ((0, 1), (0, 1))
        conv = Conv(c_out, c_out, 3, stride=2, padding=below, rngs=rngs, dtype=dtype) if downsample else None
        self.downsample = nnx.data(conv)

    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b height2 width2 o"]:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsample is None else self.downsample(x)


class UpStage(nnx.Module):
    """Residual blocks at one resolution (one more than in :class:`DownStage`), then twice the resolution."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        config: AutoencoderConfig,
        *,
        upsample: bool,
        rngs: nnx.Rngs,
        dtype: Dtype = jnp.float32,
    ):
        resnets = _resnets(c_in, c_out, config.layers_per_block + 1, config, rngs=rngs, dtype=dtype)
        self.resnets = nnx.List(resnets)
        self.upsample = nnx.data(Conv(c_out, c_out, 3, rngs=rngs, dtype=dtype) if upsample else None)

    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b height2 width2 o"]:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.upsample is None else self.upsample(upsample_nearest(x))


class MidStage(nnx.Module):
    """Residual block, attention (unless the configuration leaves it out), residual block."""

    def __init__(self, channels: int, config: AutoencoderConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        groups = config.norm_num_groups
        self.resnet_1 = Resnet(channels, channels, groups, rngs=rngs, dtype=dtype)
        self.attn = nnx.data(
            SpatialAttention(channels, groups, rngs=rngs, dtype=dtype) if config.mid_block_add_attention else None
        )
        self.resnet_2 = Resnet(channels, channels, groups, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b height width c"]:
        x = self.resnet_1(x)
        if self.attn is not None:
            x = self.attn(x)
        return self.resnet_2(x)


class Resnet(nnx.Module):
    """``shortcut(x) + conv(silu(norm(conv(silu(norm(x))))))``; no shortcut layer at equal widths."""

    def __init__(self, c_in: int, c_out: int, groups: int, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        self.norm1 = GroupNorm(c_in, groups, dtype=dtype)
        self.conv1 = Conv(c_in, c_out, 3, rngs=rngs, dtype=dtype)
        self.norm2 = GroupNorm(c_out, groups, dtype=dtype)
        self.conv2 = Conv(c_out, c_out, 3, rngs=rngs, dtype=dtype)
        self.shortcut = nnx.data(Conv(c_in, c_out, 1, rngs=rngs, dtype=dtype) if c_in != c_out else None)

    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b height width o"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class SpatialAttention(nnx.Module):
    """Self-attention of all pixels with one head as wide as the channels, added to its input."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        self.norm = GroupNorm(channels, groups, dtype=dtype)
        self.q = Linear(channels, channels, rngs=rngs, dtype=dtype)
        self.k = Linear(channels, channels, rngs=rngs, dtype=dtype)
        self.v = Linear(channels, channels, rngs=rngs, dtype=dtype)
        self.out = Linear(channels, channels, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b height width c"]:
        b, height, width, c = x.shape
        y = self.norm(x).reshape(b, height * width, c)
        y = attend_in_pieces(self.q(y), self.k(y), self.v(y))
        return x + self.out(y).reshape(x.shape)


def attend_in_pieces(
    q: Float[Array, "b s d"],
    k: Float[Array, "b s d"],
    v: Float[Array, "b s d"],
    at_once: int = QUERIES_AT_ONCE,
) -> Float[Array, "b s d"]:
    """Softmax attention with one head; more than ``at_once`` queries are processed piece by piece."""

    def attend(query: Array) -> Array:
        scores = jnp.einsum("bd,bkd->bk", query, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores / math.sqrt(q.shape[-1]), axis=-1)
        return jnp.einsum("bk,bkd->bd", weights.astype(v.dtype), v)

    rows = jnp.swapaxes(q, 0, 1)
    whole = rows.shape[0] <= at_once
    return jnp.swapaxes(jax.vmap(attend)(rows) if whole else jax.lax.map(attend, rows, batch_size=at_once), 0, 1)


def _resnets(
    c_in: int, c_out: int, count: int, config: AutoencoderConfig, *, rngs: nnx.Rngs, dtype: Dtype
) -> list[Resnet]:
    widths = (c_in, *[c_out] * (count - 1))
    return [Resnet(width, c_out, config.norm_num_groups, rngs=rngs, dtype=dtype) for width in widths]
