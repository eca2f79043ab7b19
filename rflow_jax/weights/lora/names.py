"""Which of our linears a LoRA file speaks of: every naming of the FLUX transformer, dotted or flattened."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from flax import nnx

from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.flux.transformer import FluxTransformer
from rflow_jax.models.lora import linears
from rflow_jax.weights.names.flux import BFL, DIFFUSERS

# What tools put in front of a module's name; several may follow one another.
PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet_",
    "lora_transformer_",
)
_TEXT_ENCODER = re.compile(
    r"(base_model\.model\.)?(text_encoder(_\d)?\.|text_encoders\.|lora_te\d?_|lora_text_encoder)"
)
_BLOCK = re.compile(r"((?:double_|single_|transformer_|single_transformer_)blocks)_(\d+)_(.+)")


@dataclass(frozen=True)
class Part:
    """One of our linears inside a module of a file.

    Attributes:
        path: our dotted path; ``#`` stands for the number of the block.
        via: see :class:`rflow_jax.weights.tables.Rule`.
    """

    path: str
    via: str = ""


def is_text_encoder(key: str) -> bool:
    """Whether a file's key belongs to the LoRA of a text encoder."""
    return _TEXT_ENCODER.match(key) is not None


def bare(name: str) -> str:
    """A module's name without the prefixes of tools."""
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def parts_of(name: str) -> tuple[Part, ...]:
    """Our linears that a bare module name stands for, in row order; empty if the name is not known.

    Understands diffusers' names, Black Forest Labs' and ours, with dots or, as kohya writes, underscores.
    """
    flat = name.replace(".", "_")
    block = _BLOCK.fullmatch(flat)
    if block is None:
        return _index().get(flat, ())
    kind, number, rest = block.groups()
    parts = _index().get(f"{kind}_#_{rest}", ())
    return tuple(Part(part.path.replace("#", str(int(number))), part.via) for part in parts)


@cache
def _index() -> dict[str, tuple[Part, ...]]:
    """Flattened name in any naming -> our linears, with ``#`` for the number of a block."""
    found: dict[str, list[tuple[int, Part]]] = {}
    for path in _paths():
        ours = _any_block(path)
        found[_flat(path)] = [(0, Part(ours))]
        for table in (DIFFUSERS, BFL):
            order, theirs, via = table.module(path)
            found.setdefault(_flat(theirs), []).append((order, Part(ours, via)))
    return {name: tuple(part for _, part in sorted(parts, key=lambda p: p[0])) for name, parts in found.items()}


def _paths() -> list[str]:
    """Our linears, with one block of each kind; the paths do not depend on the widths."""
    config = FluxConfig(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        axes_dims_rope=(4, 2, 2),
    )
    return list(linears(nnx.eval_shape(lambda: FluxTransformer(config, rngs=nnx.Rngs(0)))))


def _any_block(name: str) -> str:
    return re.sub(r"blocks\.0\.", "blocks.#.", name)


def _flat(name: str) -> str:
    return _any_block(name).replace(".", "_")
