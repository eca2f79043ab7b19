"""Reads LoRA files of the FLUX transformer, in the formats of diffusers, PEFT, kohya and others."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from rflow_jax.errors import InputError
from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.flux.transformer import FluxTransformer
from rflow_jax.models.lora import Adapter, linears
from rflow_jax.utils.checks import require_pattern
from rflow_jax.utils.json_files import parse_json, read_object
from rflow_jax.weights.mappings.flux import BFL, DIFFUSERS
from rflow_jax.weights.safetensors_io import TensorFiles, is_pickle, open_pickle

METADATA_KEY = "lora_adapter_metadata"  # diffusers >= 0.35
CONFIG_FILE = "adapter_config.json"  # PEFT
_COMPONENT = "transformer."


@dataclass(frozen=True)
class LoraAlpha:
    """alpha of each module.

    Attributes:
        default: of modules that no pattern matches; None means the rank.
        patterns: regular expression over a module's name (its end, as PEFT matches it) -> alpha.
        rslora: scale by alpha / sqrt(rank).
    """

    default: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False

    def alpha(self, module: str) -> float | None:
        for pattern, alpha in self.patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return alpha
        return self.default


def read_alpha(files: TensorFiles, *, has_alpha_keys: bool, default: float | None) -> LoraAlpha:
    """Reads the header's metadata (diffusers', kohya's) or PEFT's ``adapter_config.json`` beside the file.

    Args:
        has_alpha_keys: the file has ``.alpha`` tensors, so kohya's single number is ignored.
        default: if the file does not give it.
    """
    source, config = str(files.files[0]), _peft_config(files)
    if not config:
        if not has_alpha_keys and (text := files.metadata.get("ss_network_alpha")) not in (None, "None", ""):
            return LoraAlpha(_number(text, "ss_network_alpha", source))
        return LoraAlpha(default)
    for key in ("use_dora", "lora_bias"):
        if config.get(key):
            raise InputError(f"{source}: its configuration says {key}, which is not supported")
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{source}: alpha_pattern is {patterns!r}; expected keys with numbers")
    for pattern in patterns:
        require_pattern(f"{source}: alpha_pattern {pattern}", pattern)
    return LoraAlpha(
        default if alpha is None else _number(alpha, "lora_alpha", source),
        {pattern: _number(value, pattern, source) for pattern, value in patterns.items()},
        bool(config.get("use_rslora")),
    )


def _peft_config(files: TensorFiles) -> dict[str, Any]:
    """PEFT's configuration of the transformer's adapter; empty if not given."""
    file = files.files[0]
    beside = file.with_name(CONFIG_FILE)
    try:
        if METADATA_KEY in files.metadata:
            everything = parse_json(files.metadata[METADATA_KEY], str(file))
            own = {k.removeprefix(_COMPONENT): v for k, v in everything.items() if k.startswith(_COMPONENT)}
            return own or {k: v for k, v in everything.items() if "." not in k}
        if file.stem == "adapter_model" and beside.is_file():
            return read_object(beside)
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file}: the configuration of the LoRA does not parse ({error})") from error
    return {}


def _number(value: Any, name: str, source: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{source}: {name} is {value!r}, expected a number") from error


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
        via: see :class:`rflow_jax.weights.key_mapping.Rule`.
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
    """Our linears that a bare module name means, in row order; empty if the name is not known.

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
    # One block of each kind; the paths do not depend on the widths.
    config = FluxConfig(
        num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1, axes_dims_rope=(4, 2, 2)
    )
    found: dict[str, list[tuple[int, Part]]] = {}
    for path in linears(nnx.eval_shape(lambda: FluxTransformer(config, rngs=nnx.Rngs(0)))):
        ours = _any_block(path)
        found[_flat(path)] = [(0, Part(ours))]
        for table in (DIFFUSERS, BFL):
            order, theirs, via = table.module(path)
            found.setdefault(_flat(theirs), []).append((order, Part(ours, via)))
    return {name: tuple(part for _, part in sorted(parts, key=lambda p: p[0])) for name, parts in found.items()}


def _any_block(name: str) -> str:
    return re.sub(r"blocks\.0\.", "blocks.#.", name)


def _flat(name: str) -> str:
    return _any_block(name).replace(".", "_")


LORA_FILE = "pytorch_lora_weights.safetensors"  # the name diffusers looks for
PEFT_FILE = "adapter_model.safetensors"
OUR_FILE = "lora.safetensors"

_A, _B, _ALPHA = "A", "B", "alpha"
_KINDS = {
    "lora_A": _A,
    "lora.down": _A,
    "lora_down": _A,
    "lora_a": _A,
    "lora_B": _B,
    "lora.up": _B,
    "lora_up": _B,
    "lora_b": _B,
    "alpha": _ALPHA,
    "lora.alpha": _ALPHA,
    "lora_A.alpha": _ALPHA,
}
# An adapter's name may stand before ``.weight``, as PEFT has it in memory.
_KEY = re.compile(
    r"(?P<module>.+?)\.(?P<leaf>lora_[AB]|lora\.(?:down|up)|lora_(?:down|up)|lora_[ab]|(?:lora\.|lora_A\.)?alpha)"
    r"(?:\.[A-Za-z0-9_-]+)??(?:\.weight)?"
)
_REFUSED = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r".*(lora_magnitude_vector|dora_scale).*", "a DoRA, whose magnitudes are not supported"),
        (r".*lora_(B|up)(\.[^.]+)?\.bias", "an adapter with a bias of its own"),
        (
            r".*((query|key)_norm\.scale|norm_(added_)?[qk]\.weight)",
            "it also replaces norms, as Black Forest Labs' control LoRAs do",
        ),
        (r".*\.(diff|diff_b|set_weight)", "a difference of whole tensors"),
        (r".*(lokr_|hada_|oft_|lora_mid|boft_|glora|\.[ab][12]\.weight).*", "an adapter of another kind than LoRA"),
    )
)


@dataclass(frozen=True)
class LoraFile(Mapping[str, Adapter]):
    """The adapters of a file, by our dotted path.

    Attributes:
        adapters: our dotted path -> adapter, in the dtype and rank of the file.
        metadata: the string pairs of the file's header.
        source: the file, for messages.
    """

    adapters: dict[str, Adapter]
    metadata: dict[str, str] = field(default_factory=dict)
    source: str = "LoRA"

    def __getitem__(self, path: str) -> Adapter:
        return self.adapters[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.adapters)

    def __len__(self) -> int:
        return len(self.adapters)


def read_lora(
    path: str | os.PathLike[str],
    *,
    alpha: float | None = None,
    ignore_text_encoder: bool = False,
    allow_pickle: bool = False,
) -> LoraFile:
    """Reads a LoRA file, or a folder with one.

    Fused modules (qkv, ``linear1``) are split: the parts share A, and each has its rows of B. Whether the adapters fit
    a network is checked by :func:`rflow_jax.models.lora.check_fit`, which ``attach`` calls.

    Args:
        alpha: if the file does not give it; None means the rank.
        ignore_text_encoder: leave out adapters of text encoders instead of refusing them.
        allow_pickle: read ``.bin``, ``.pt`` and the like, through ``torch.load(weights_only=True)``.

    Raises:
        InputError: no such file, a key that is not understood, an incomplete or inconsistent module.
    """
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in (OUR_FILE, LORA_FILE, PEFT_FILE) if (path / name).is_file()), path)
    files = open_pickle(path, allow=allow_pickle) if is_pickle(path) else TensorFiles.open(path)
    source = str(files.files[0])
    keys = [key for key in files if not (is_text_encoder(key) and ignore_text_encoder)]
    if foreign := [key for key in keys if is_text_encoder(key)]:
        raise InputError(
            f"{source}: {len(foreign)} tensors are for a text encoder, such as {foreign[0]}; only the "
            "transformer takes a LoRA; leave them out with ignore_text_encoder"
        )
    modules = _group(keys, files, source)
    strength = read_alpha(files, has_alpha_keys=any(_ALPHA in m for m in modules.values()), default=alpha)
    adapters: dict[str, Adapter] = {}
    for name, tensors in modules.items():
        for part, adapter in _split(name, _adapter(name, tensors, strength, source), source):
            if part in adapters:
                raise InputError(f"{source}: {name} is a second adapter of {part}")
            adapters[part] = adapter
    if not adapters:
        raise InputError(f"{source}: has no adapter of the transformer, so it can have no effect")
    return LoraFile(dict(sorted(adapters.items())), files.metadata, source)


def _group(keys: list[str], files: TensorFiles, source: str) -> dict[str, dict[str, np.ndarray]]:
    """Bare module name -> its tensors by kind."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    for key in keys:
        if reason := next((reason for pattern, reason in _REFUSED if pattern.fullmatch(key)), None):
            if key.endswith((".diff", ".diff_b")) and not files.read(key).astype(np.float32).any():
                continue  # zeros that some tools write too: no effect
            raise InputError(f"{source}: {key}: {reason}; not supported")
        match = _KEY.fullmatch(key)
        name = bare(match["module"]) if match else ""
        if match is None or not parts_of(name):
            raise InputError(f"{source}: {key} is not a LoRA of a linear of the FLUX transformer")
        kind = _KINDS[match["leaf"]]
        if kind in modules.setdefault(name, {}):
            raise InputError(f"{source}: {key} is the second {kind} of {name}")
        tensor = files.read(key)
        # Ours are stored as the network has them, [in, r] and [r, out].
        modules[name][kind] = tensor.T if match["leaf"] in ("lora_a", "lora_b") else tensor
    return modules


def _adapter(name: str, tensors: Mapping[str, np.ndarray], strength: LoraAlpha, source: str) -> Adapter:
    missing = [kind for kind in (_A, _B) if kind not in tensors]
    if missing:
        raise InputError(f"{source}: {name} has {' and '.join(sorted(tensors))} but no {' and '.join(missing)}")
    a, b = tensors[_A], tensors[_B]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.size:
        raise InputError(f"{source}: {name} has A {list(a.shape)} and B {list(b.shape)}; expected [r, in] and [out, r]")
    alpha = strength.alpha(name)
    if _ALPHA in tensors:
        if tensors[_ALPHA].size != 1:
            shape = list(tensors[_ALPHA].shape)
            raise InputError(f"{source}: the alpha of {name} has shape {shape}; expected one number")
        alpha = float(tensors[_ALPHA].reshape(()))
    if alpha is not None and not np.isfinite(alpha):
        raise InputError(f"{source}: the alpha of {name} is {alpha}")
    return Adapter(np.ascontiguousarray(a), np.ascontiguousarray(b), alpha, strength.rslora)


def _split(name: str, adapter: Adapter, source: str) -> Iterator[tuple[str, Adapter]]:
    """The adapters of the linears in a module: they share A, each has its rows of B."""
    parts = parts_of(name)
    # q, k and v are square; the rest belongs to the last part (v itself, or the single block's mlp).
    starts = [adapter.a.shape[1] * k for k in range(1, len(parts))]
    if starts and adapter.b.shape[0] <= starts[-1]:
        raise InputError(
            f"{source}: {name} has A {list(adapter.a.shape)} and B {list(adapter.b.shape)}; the "
            f"{len(parts)} linears fused in it need over {starts[-1]} rows of B; a LoRA for another network"
        )
    for part, rows in zip(parts, np.split(adapter.b, starts), strict=True):
        if part.via == "swap_halves":
            if rows.shape[0] % 2:
                raise InputError(f"{source}: {name} has B {list(rows.shape)}; expected an even number of rows")
            rows = np.concatenate(np.split(rows, 2)[::-1])
        yield part.path, Adapter(adapter.a, np.ascontiguousarray(rows), adapter.alpha, adapter.rslora)
