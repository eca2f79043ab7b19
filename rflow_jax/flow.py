"""Flow matching on latents: the schedule and its Euler steps, and an image's latents as the transformer's tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.flux.layers import Rope, rope_table
from rflow_jax.typing import Array, Float


@dataclass(frozen=True)
class Schedule:
    """A flow-matching Euler schedule, in the names of diffusers' ``scheduler_config.json``.

    ``use_dynamic_shifting`` (FLUX.1-dev) shifts by mu, linear in the image tokens: more tokens need
    more of the steps at high noise. Otherwise (FLUX.1-schnell) the constant ``shift`` applies.
    """

    use_dynamic_shifting: bool = True
    shift: float = 3.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096

    def __post_init__(self) -> None:
        if self.max_image_seq_len <= self.base_image_seq_len:
            raise InputError("scheduler_config.json: max_image_seq_len must be above base_image_seq_len")
        if self.shift <= 0:
            raise InputError(f"scheduler_config.json: shift is {self.shift}; expected a number above 0")

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Schedule:
        """From the content of ``scheduler_config.json``; raises InputError for another kind of schedule."""
        if (name := config.get("_class_name", "FlowMatchEulerDiscreteScheduler")) != "FlowMatchEulerDiscreteScheduler":
            raise InputError(f"scheduler_config.json: a {name}; FLUX uses FlowMatchEulerDiscreteScheduler")
        other = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "shift_terminal")
        if used := [key for key in other if config.get(key)]:
            raise InputError(f"scheduler_config.json: {used[0]} is not supported (FLUX does not use it)")
        if config.get("time_shift_type", "exponential") != "exponential":
            raise InputError("scheduler_config.json: time_shift_type must be exponential")
        return cls(**{key: config[key] for key in cls.__dataclass_fields__ if key in config})

    def mu(self, image_tokens: int) -> float:
        """The shift's exponent for this many image tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return self.base_shift + slope * (image_tokens - self.base_image_seq_len)

    def sigmas(self, steps: int, image_tokens: int) -> np.ndarray:
        """[steps + 1] float32, falling from 1 to 0; step k goes from sigma k to sigma k + 1."""
        sigma = np.linspace(1.0, 1.0 / steps, steps)
        factor = math.exp(self.mu(image_tokens)) if self.use_dynamic_shifting else self.shift
        shifted = factor * sigma / (1 + (factor - 1) * sigma)
        return np.append(shifted, 0.0).astype(np.float32)


# (x [b, i, f] float32, t scalar, step) -> velocity of the same shape
Velocity = Callable[[Array, Array, Array], Array]


def euler(
    velocity: Velocity, x: Float[Array, "b i f"], sigmas: Float[Array, " n"]
) -> tuple[Float[Array, "b i f"], Float[Array, "k b i f"]]:
    """Explicit Euler steps from ``sigmas[0]`` to ``sigmas[-1]``; x stays float32 between steps.

    Returns:
        The sample, and x after every step (dropped by the compiler if unused).
    """

    def step(x: Array, k: Array) -> tuple[Array, Array]:
        t, t_next = sigmas[k], sigmas[k + 1]
        x = x + (t_next - t) * velocity(x, t, k).astype(jnp.float32)
        return x, x

    return jax.lax.scan(step, x.astype(jnp.float32), jnp.arange(sigmas.shape[0] - 1))


def guided(with_condition: Array, with_black: Array, scale: Array | float) -> Array:
    """Image guidance: away from the prediction for a black condition, ``u + s (c - u)``."""
    return with_black + scale * (with_condition - with_black)


PATCH = 2  # a token is a patch of 2 x 2 latents


def pack(latents: Float[Array, "b y x z"]) -> Float[Array, "b i f"]:
    """Grid of latents -> tokens in row order, each a patch with its channels outermost (f = 4 z)."""
    b, y, x, z = latents.shape
    grid = latents.reshape(b, y // PATCH, PATCH, x // PATCH, PATCH, z)
    return grid.transpose(0, 1, 3, 5, 2, 4).reshape(b, (y // PATCH) * (x // PATCH), z * PATCH * PATCH)


def unpack(tokens: Float[Array, "b i f"], y: int, x: int) -> Float[Array, "b y x z"]:
    """The inverse of :func:`pack` for a grid of ``y`` x ``x`` latents."""
    b, _, f = tokens.shape
    grid = tokens.reshape(b, y // PATCH, x // PATCH, f // PATCH**2, PATCH, PATCH)
    return grid.transpose(0, 1, 4, 2, 5, 3).reshape(b, y, x, f // PATCH**2)


def image_ids(rows: int, columns: int, delta: tuple[int, int] = (0, 0)) -> np.ndarray:
    """[rows * columns, 3] positions (0, row, column) of tokens, moved by ``delta``."""
    ids = np.zeros((rows, columns, 3), np.float32)
    ids[..., 1] = np.arange(rows)[:, None] + delta[0]
    ids[..., 2] = np.arange(columns)[None, :] + delta[1]
    return ids.reshape(-1, 3)


def text_ids(tokens: int) -> np.ndarray:
    """Text has no position: [tokens, 3] zeros."""
    return np.zeros((tokens, 3), np.float32)


def condition_delta(columns: int) -> tuple[int, int]:
    """The original's offset of the condition: left of the image, by its own width in tokens."""
    return (0, -columns)


def rope_for(config: FluxConfig, text: int, image: tuple[int, int], condition: tuple[int, int] | None = None) -> Rope:
    """Rotary angles of [text, image, condition].

    Args:
        text: number of text tokens.
        image, condition: rows and columns of tokens (pixels / 16).
    """
    ids = [text_ids(text), image_ids(*image)]
    if condition is not None:
        ids.append(image_ids(*condition, delta=condition_delta(condition[1])))
    return rope_table(np.concatenate(ids), config.axes_dims_rope, config.rope_theta)
