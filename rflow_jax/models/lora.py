"""Adapters (LoRA) of a network's linears: attach, detach, initialise, read back.

An adapter belongs to one :class:`rflow_jax.models.layers.Linear`, named by its dotted path in the network.
The rows it acts on are an argument of the linear's call.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax.sharding import Sharding

from rflow_jax.errors import InputError
from rflow_jax.models.layers import Linear, LoRAScale
from rflow_jax.models.options import CORRECTOR_TARGET_MODULES

Model = TypeVar("Model", bound=nnx.Module)


# Linears of text tokens only, and the head, of image tokens only: a LoRA on condition tokens has no effect there.
NOT_ON_CONDITION = r"text_in|double_blocks\.\d+\.text\..*|final_mod|final_out"
# Linears of the last block, whose condition tokens are not used any more. The original trains them all the same.
_UNREAD = r"single_blocks\.{last}\.(qkv\.q|mlp|out)"


@dataclass(frozen=True)
class Adapter:
    """The low-rank change of one linear, in the layout of files: ``y += scale * (x @ a.T) @ b.T``.

    Attributes:
        a: [r, in].
        b: [out, r].
        alpha: strength; None stands for the rank.
        rslora: the scale is alpha / sqrt(r) instead of alpha / r.
    """

    a: np.ndarray
    b: np.ndarray
    alpha: float | None = None
    rslora: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def linears(model: nnx.Module) -> dict[str, Linear]:
    """Dotted path -> linear, for every linear of the network (abstract or concrete)."""
    found = {".".join(map(str, path)): m for path, m in nnx.iter_modules(model) if isinstance(m, Linear)}
    return dict(sorted(found.items()))


def linear_shapes(model: nnx.Module) -> dict[str, tuple[int, int]]:
    """Dotted path -> (in, out) of every linear."""
    shapes = {path: linear.kernel.shape for path, linear in linears(model).items()}
    return {path: (shape[0], shape[1]) for path, shape in shapes.items()}


def check_fit(adapters: Mapping[str, Adapter], shapes: Mapping[str, tuple[int, int]], source: str = "LoRA") -> None:
    """Raises InputError unless every adapter belongs to a linear of the network and has its sizes."""
    if not adapters:
        raise InputError(f"{source}: contains no adapter, so it can have no effect")
    for path, adapter in adapters.items():
        if path not in shapes:
            raise InputError(f"{source}: {path} is not a linear of this network; a LoRA for another network")
        d_in, d_out = shapes[path]
        if adapter.a.shape != (adapter.rank, d_in) or adapter.b.shape != (d_out, adapter.rank):
            raise InputError(
                f"{source}: {path} has A {list(adapter.a.shape)} and B {list(adapter.b.shape)}, the network's "
                f"linear takes {d_in} and gives {d_out}; a LoRA for another network"
            )


def attach(
    model: Model,
    adapters: Mapping[str, Adapter],
    *,
    dtype: Dtype | None = None,
    put: Callable[[str, np.ndarray], jax.Array] | None = None,
    source: str = "LoRA",
) -> Model:
    """Attaches adapters in place of those the model had, and returns the model.

    Args:
        adapters: dotted path of a linear -> its adapter.
        dtype: of the matrices; None keeps the file's.
        put: places an array on devices, given its dotted path; None: the default device.
        source: the adapters' name in errors, usually their file.

    Raises:
        InputError: an adapter does not fit (see :func:`check_fit`).
    """
    modules = linears(model)
    check_fit(adapters, linear_shapes(model), source)
    put = put or (lambda _, value: jnp.asarray(value))
    detach(model)
    for path, adapter in adapters.items():
        a, b = (np.ascontiguousarray(m.T if dtype is None else m.T.astype(dtype)) for m in (adapter.a, adapter.b))
        scale = np.asarray(adapter.scale, np.float32)
        values = {"lora_a": a, "lora_b": b, "lora_scale": scale}
        set_adapter(modules[path], {name: put(f"{path}.{name}", value) for name, value in values.items()})
    return model


def attach_shapes(model: Model, ranks: Mapping[str, int], *, dtype: Dtype = jnp.float32) -> Model:
    """Attaches abstract adapters of the given ranks: for compiling a program before its LoRA is read."""
    modules, shapes = linears(model), linear_shapes(model)
    for path, rank in ranks.items():
        if path not in modules:
            raise InputError(f"LoRA: {path} is not a linear of this network")
        d_in, d_out = shapes[path]
        values = {
            "lora_a": jax.ShapeDtypeStruct((d_in, rank), dtype),
            "lora_b": jax.ShapeDtypeStruct((rank, d_out), dtype),
            "lora_scale": jax.ShapeDtypeStruct((), jnp.float32),
        }
        set_adapter(modules[path], values)
    return model


def init_lora(
    model: Model,
    rank: int,
    *,
    alpha: float | None = None,
    pattern: str = CORRECTOR_TARGET_MODULES,
    rngs: nnx.Rngs,
    dtype: Dtype = jnp.float32,
    sharding_for: Callable[[str, tuple[int, ...]], Sharding] | None = None,
) -> Model:
    """Attaches fresh adapters to every linear whose path ``pattern`` matches as a whole; returns the model.

    A is normal with standard deviation 1 / rank and B is zero, so the network computes what it did before.

    Args:
        alpha: strength; None stands for the rank (scale 1).
        sharding_for: (dotted path, shape) -> an array's sharding; None: the default device.

    Raises:
        InputError: the pattern matches no linear.
    """
    chosen = select(linears(model), pattern)
    scale = (rank if alpha is None else alpha) / rank
    shapes = linear_shapes(model)
    for path, linear in chosen.items():
        d_in, d_out = shapes[path]

        def sharding(name: str, shape: tuple[int, ...], path: str = path) -> Any:
            return None if sharding_for is None else sharding_for(f"{path}.{name}", shape)

        a, b = ("lora_a", (d_in, rank)), ("lora_b", (rank, d_out))
        values = {
            "lora_a": _init_a(sharding(*a))(rngs.params(), a[1], dtype),
            "lora_b": jnp.zeros(b[1], dtype, device=sharding(*b)),
            "lora_scale": jnp.full((), scale, jnp.float32, device=sharding("lora_scale", ())),
        }
        set_adapter(linear, values)
    return model


@cache
def _init_a(sharding: Sharding | None) -> Callable[[jax.Array, tuple[int, ...], Any], jax.Array]:
    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Dtype) -> jax.Array:
        return jax.random.normal(key, shape, dtype) / shape[1]

    return jax.jit(draw, static_argnums=(1, 2), out_shardings=sharding)


def select(modules: Mapping[str, Any], pattern: str) -> dict[str, Any]:
    """The entries whose dotted path the regular expression matches as a whole."""
    chosen = {path: module for path, module in modules.items() if re.fullmatch(pattern, path)}
    if not chosen:
        raise InputError(f"the LoRA pattern {pattern!r} matches no linear, such as {next(iter(modules), None)!r}")
    return chosen


def without_condition_effect(paths: Sequence[str], single_blocks: int) -> tuple[list[str], list[str]]:
    """The adapters that cannot change an image if the LoRA acts on condition tokens only.

    Args:
        paths: dotted paths of the linears with an adapter.
        single_blocks: of the network.

    Returns:
        Those whose linears no condition token passes through, and those whose result for the condition is unused.
    """
    idle = [path for path in paths if re.fullmatch(NOT_ON_CONDITION, path)]
    return idle, [path for path in paths if re.fullmatch(_UNREAD.replace("{last}", str(single_blocks - 1)), path)]


def detach(model: Model) -> Model:
    """Removes every adapter, in place."""
    for linear in linears(model).values():
        linear.lora_a = linear.lora_b = linear.lora_scale = nnx.data(None)
    return model


def adapters_of(model: nnx.Module) -> dict[str, Adapter]:
    """The adapters of a concrete model, in the layout of files."""
    return adapters_in(nnx.state(model))


def adapters_in(*states: nnx.State) -> dict[str, Adapter]:
    """The adapters in concrete parameters by block, in the layout of files."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for path, variable in (item for state in states for item in nnx.to_flat_state(state)):
        if isinstance(variable, (nnx.LoRAParam, LoRAScale)):
            found.setdefault(".".join(map(str, path[:-1])), {})[str(path[-1])] = np.asarray(variable.get_value())
    return {path: _adapter(**found[path]) for path in sorted(found)}


def _adapter(lora_a: np.ndarray, lora_b: np.ndarray, lora_scale: np.ndarray) -> Adapter:
    a, b = (np.ascontiguousarray(matrix.T) for matrix in (lora_a, lora_b))
    # The shortest decimal that names the float32 scale: alpha 1 at rank 3 comes back as 1.
    return Adapter(a, b, float(str(np.float32(lora_scale * np.float32(a.shape[0])))))


def set_adapter(linear: Any, values: Mapping[str, Any]) -> None:
    """Gives a linear ``lora_a``, ``lora_b`` and ``lora_scale``, arrays or their shapes."""
    linear.lora_a = nnx.data(nnx.LoRAParam(values["lora_a"]))
    linear.lora_b = nnx.data(nnx.LoRAParam(values["lora_b"]))
    linear.lora_scale = nnx.data(LoRAScale(values["lora_scale"]))
