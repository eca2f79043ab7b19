"""The names of a LoRA file's modules, in the naming of any tool, as our linears."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from flax import nnx

from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.flux.transformer import FluxTransformer
from rflow_jax.models.lora import linears
from rflow_jax.weights.key_mapping import Rule
from rflow_jax.weights.mappings.flux import BFL, DIFFUSERS, XLABS

# What tools put in front of a module's name; several may follow one another.
PREFIXES = (
    "module.",  # PyTorch's wrappers
    "_orig_mod.",
    "_orig_mod_",
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
_WRAPPERS = re.compile(r"(?:module\.|_orig_mod\.|base_model\.model\.)*")
_TEXT_ENCODER = re.compile(
    r"text_encoder(_\d)?\.|text_encoders\.|text_model\.|lora_te\d?_|lora_text_encoder|lora_(clip|t5)|(clip_[lg]|t5xxl)\."
)
_BLOCK = re.compile(r"((?:double_|single_|transformer_|single_transformer_)blocks)_(\d+)_(.+)")


@dataclass(frozen=True)
class Part:
    """One of our linears inside a module of a file.

    Attributes:
        path: our dotted path; ``#`` stands for the number of the block.
        via: see :class:`rflow_jax.weights.key_mapping.Rule`.
    """

    path: str
    via: str = ""


def is_text_encoder(key: str) -> bool:
    """Whether a file's key belongs to the LoRA of a text encoder."""
    wrappers = _WRAPPERS.match(key)
    return _TEXT_ENCODER.match(key, wrappers.end() if wrappers else 0) is not None


def bare(name: str) -> str:
    """A module's name without the prefixes of tools, and without what compiled blocks or kohya's underscores add."""
    name = name.replace("._orig_mod.", ".")
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name.strip("_")


def parts_of(name: str) -> tuple[Part, ...]:
    """Our linears that a bare module name means, in row order; empty if the name is not known.

    Understands diffusers' names, Black Forest Labs', XLabs' and ours, with dots or, as kohya writes, underscores.
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
    # One block of each kind; the paths do not depend on the widths.
    config = FluxConfig(
        num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1, axes_dims_rope=(4, 2, 2)
    )
    found: dict[str, list[tuple[int, Part]]] = {}
    for path in linears(nnx.eval_shape(lambda: FluxTransformer(config, rngs=nnx.Rngs(0)))):
        ours = _any_block(path)
        found[_flat(path)] = [(0, Part(ours))]
        for rules in (DIFFUSERS.rules, BFL.rules, XLABS):
            for order, theirs, via in _named(rules, path):
                found.setdefault(_flat(theirs), []).append((order, Part(ours, via)))
    return {name: tuple(part for _, part in sorted(parts, key=lambda p: p[0])) for name, parts in found.items()}


def _named(rules: Iterable[Rule], path: str) -> list[tuple[int, str, str]]:
    """(index of the rule, the file's module, the order of its rows) of one of our linears, if it has a name there."""
    hits = [(k, rule, re.fullmatch(rule.flax, path)) for k, rule in enumerate(rules)]
    return [(k, match.expand(rule.torch), rule.via) for k, rule, match in hits if match]


def _any_block(name: str) -> str:
    return re.sub(r"blocks\.0\.", "blocks.#.", name)


def _flat(name: str) -> str:
    return _any_block(name).replace(".", "_")
