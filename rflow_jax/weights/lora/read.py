"""Reads LoRA files of the FLUX transformer, in the formats of diffusers, PEFT, kohya and others."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.models.lora import Adapter
from rflow_jax.weights.lora.metadata import LoraAlpha, read_alpha
from rflow_jax.weights.lora.names import bare, is_text_encoder, parts_of
from rflow_jax.weights.pytorch_files import is_pickle, open_pickle
from rflow_jax.weights.safetensors_io import TensorFiles

log = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name diffusers looks for
PEFT_FILE = "adapter_model.safetensors"
OUR_FILE = "lora.safetensors"

_A, _B, _ALPHA = "A", "B", "alpha"
_KINDS = {
    "lora_A": _A,
    "down": _A,
    "lora.down": _A,
    "lora_down": _A,
    "lora_a": _A,
    "lora_B": _B,
    "up": _B,
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
_XLABS_KEY = re.compile(r"(?P<module>.+\.processor\.(?:qkv|proj)_lora\d?)\.(?P<leaf>down|up)(?:\.weight)?")
# What a key says of its file; of several, the first counts.
_REFUSED = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"(.*\.)?bundle_emb\..*", "OneTrainer's bundle of a LoRA with embeddings"),
        (r".*lokr_.*", "a LoKr"),
        (r".*hada_.*", "a LoHa"),
        (r".*boft_.*", "a BOFT"),
        (r".*oft_.*", "an OFT"),
        (r".*ia3_.*|.*\.on_input", "an IA3"),
        (r".*(glora|\.[ab][12]\.weight).*", "a GLoRA"),
        (r".*vera_lambda_.*", "a VeRA"),
        (r".*(lora_E|ranknum).*", "an AdaLoRA"),
        (r".*lora_mid.*", "a LoCon with Tucker's decomposition"),
        (r".*(lora_magnitude_vector|dora_scale).*", "a DoRA, whose magnitudes are not read"),
        (r".*lora_(B|up)(\.[^.]+)?\.bias", "a LoRA with a bias of its own"),
        (
            r".*((query|key)_norm\.scale|norm_(added_)?[qk]\.weight|\.[wb]_norm)",
            "a LoRA that also changes norms, as Black Forest Labs' control LoRAs do",
        ),
        (r".*\.(diff|diff_b|set_weight)", "a difference of whole tensors"),
        (r".*(emb_params|string_to_param).*", "an embedding (textual inversion)"),
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
        ignore_text_encoder: leave out adapters of text encoders, as always, but without a warning.
        allow_pickle: read ``.bin``, ``.pt`` and the like, through ``torch.load(weights_only=True)``.

    Raises:
        InputError: no such file, a key that is not understood, an incomplete or inconsistent module.
    """
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in (OUR_FILE, LORA_FILE, PEFT_FILE) if (path / name).is_file()), path)
    files = open_pickle(path, allow=allow_pickle) if is_pickle(path) else TensorFiles.open(path)
    source = str(files.files[0])
    keys = [key for key in files if not is_text_encoder(key)]
    modules = _group(_require_lora(keys, files, source), files, source)
    has_alpha_keys = any(_ALPHA in tensors for tensors in modules.values())
    strength = read_alpha(files, modules, has_alpha_keys=has_alpha_keys, default=alpha)
    adapters: dict[str, Adapter] = {}
    for name, tensors in modules.items():
        for part, adapter in _split(name, _adapter(name, tensors, strength, source), source):
            if part in adapters:
                raise InputError(f"{source}: {name} is a second adapter of {part}")
            adapters[part] = adapter
    if not adapters:
        raise InputError(f"{source}: has no adapter of the transformer, so it can have no effect")
    if (foreign := [key for key in files if is_text_encoder(key)]) and not ignore_text_encoder:
        log.warning(
            "%s: left out what is for a text encoder (%d tensors, such as %r): only the transformer takes a LoRA",
            *(source, len(foreign), foreign[0]),
        )
    return LoraFile(dict(sorted(adapters.items())), files.metadata, source)


def _require_lora(keys: list[str], files: TensorFiles, source: str) -> list[str]:
    """The keys of a LoRA's tensors; raises InputError, naming it, for another kind of adapter."""
    # Zeros that some tools write too have no effect.
    idle = {k for k in keys if k.endswith((".diff", ".diff_b")) and not files.read(k).astype(np.float32).any()}
    keys = [key for key in keys if key not in idle]
    for pattern, kind in _REFUSED:
        if found := next((key for key in keys if pattern.fullmatch(key)), None):
            raise InputError(f"{source}: {kind}, as {found} says; not supported, only a plain LoRA is")
    return keys


def _group(keys: list[str], files: TensorFiles, source: str) -> dict[str, dict[str, np.ndarray]]:
    """Bare module name -> its tensors by kind."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    for key in keys:
        match = _XLABS_KEY.fullmatch(key) or _KEY.fullmatch(key)
        name = bare(match["module"]) if match else ""
        if match is None or not parts_of(name):
            raise InputError(f"{source}: {key} is not a LoRA of a linear of the FLUX transformer")
        kind = _KINDS[match["leaf"]]
        if kind in modules.setdefault(name, {}):
            raise InputError(f"{source}: {key} is the second {kind} of {name}")
        tensor = files.read(key)
        if kind != _ALPHA and tensor.dtype.kind in "iub":
            raise InputError(f"{source}: {key} is stored as {tensor.dtype}; expected floating-point numbers")
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
