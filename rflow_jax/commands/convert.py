"""``rflow convert``: PyTorch's checkpoints to ours, and LoRA both ways."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rflow_jax.errors import InputError
from rflow_jax.utils.cli import Command
from rflow_jax.utils.ranges import Positive, require_ranges

Dtype = Literal["bfloat16", "float16", "float32"]
Format = Literal["safetensors", "orbax"]


@dataclass(frozen=True)
class QwenConversion:
    """A Qwen2.5-VL: a folder of Transformers, or a Hub id, to a folder of ours.

    Attributes:
        src: what to read.
        dst: what to write; must not exist.
        format: how to store parameters.
        dtype: of all parameters; without it each keeps its own.
    """

    src: str
    dst: str
    format: Format = "safetensors"
    dtype: Dtype | None = None


@dataclass(frozen=True)
class NvilaConversion(QwenConversion):
    """NVILA: a published checkpoint (llm, vision_tower, mm_projector) to a folder of ours.

    Attributes:
        allow_pickle: read PyTorch's .bin and .pth files, by torch with weights_only.
    """

    allow_pickle: bool = False


@dataclass(frozen=True)
class FluxConversion(NvilaConversion):
    """A FLUX model: a diffusers folder, a Hub id or Black Forest Labs' single files to a folder of ours.

    Attributes:
        ae: for single files: ae.safetensors, or its Hub id (owner/name:ae.safetensors).
        text: for single files: a diffusers folder with text encoders and tokenizers, or files of the text encoders
            (clip_l.safetensors, t5xxl_fp16.safetensors, in any order), also with a folder that has the tokenizers;
            paths or Hub ids.
    """

    ae: str | None = None
    text: str | list[str] | None = None


@dataclass(frozen=True)
class LoraConversion:
    """A LoRA file of any common format to ours.

    Attributes:
        src: what to read.
        dst: what to write; must not exist.
        alpha: where the file does not say it; the rank without this.
        ignore_text_encoder: leave out what is for a text encoder without a warning.
        allow_pickle: read PyTorch's .bin and .pth files, by torch with weights_only.
    """

    src: str
    dst: str
    alpha: Positive | None = None
    ignore_text_encoder: bool = False
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        require_ranges(self)


@dataclass(frozen=True)
class LoraExport(LoraConversion):
    """A LoRA of any common format to diffusers' ``pytorch_lora_weights.safetensors``.

    Attributes:
        fold_alpha: multiply alpha / rank into B, for readers that ignore the file's header.
    """

    fold_alpha: bool = False


@dataclass(frozen=True)
class Packing:
    """A folder of a small model or LoRA with its matrices in 8 bits and the sums of its files, to ship it.

    Every command reads such a folder, and unpacks it into its cache; a damaged file is an error.

    Attributes:
        src: folder to read.
        dst: what to write; must not exist.
        made: how the content was made, for the manifest, such as {"hardware": "one H100"}.
    """

    src: str
    dst: str
    made: dict[str, str] = field(default_factory=dict)


def command(name: str, argv: Sequence[str]) -> Command:
    """The conversion of this name."""
    config, run = _CONVERSIONS[name]
    return Command((config,), run, ("src", "dst"))


def flux(config: FluxConversion) -> None:
    """Converts a FLUX model."""
    from rflow_jax.weights.convert import TOKENIZERS, Options, convert_flux
    from rflow_jax.weights.hub import WANTED_TEXT, resolve

    texts = [config.text] if isinstance(config.text, str) else config.text or ()
    options = Options(
        storage=config.format,
        dtype=_numpy_dtype(config.dtype),
        allow_pickle=config.allow_pickle,
        ae=resolve(config.ae) if config.ae else None,
        text=tuple(resolve(one, WANTED_TEXT) for one in texts),
    )
    src = resolve(config.src)
    with _Progress() as progress:
        convert_flux(src, Path(config.dst), options, progress)
    print(f"{config.dst}: converted")
    if options.text and (missing := [name for name in TOKENIZERS if not Path(config.dst, name).is_dir()]):
        print(
            f"{config.dst}: has no {' and no '.join(missing)}: before generating, copy these folders there from any "
            "FLUX.1 folder in diffusers' layout",
            file=sys.stderr,
        )


def nvila(config: NvilaConversion) -> None:
    """Converts an NVILA checkpoint."""
    from rflow_jax.weights.convert import Options
    from rflow_jax.weights.hub import resolve
    from rflow_jax.weights.nvila import WANTED, convert_nvila

    options = Options(storage=config.format, dtype=_numpy_dtype(config.dtype), allow_pickle=config.allow_pickle)
    src = resolve(config.src, WANTED)
    with _Progress() as progress:
        convert_nvila(src, Path(config.dst), options, progress)
    print(f"{config.dst}: converted")


def qwen(config: QwenConversion) -> None:
    """Converts a Qwen2.5-VL."""
    from rflow_jax.weights.convert import convert_qwen
    from rflow_jax.weights.hub import resolve_vlm

    src, dtype = resolve_vlm(config.src), _numpy_dtype(config.dtype)
    with _Progress() as progress:
        convert_qwen(src, Path(config.dst), storage=config.format, dtype=dtype, on_progress=progress)
    print(f"{config.dst}: converted")


def lora(config: LoraConversion) -> None:
    """Converts a LoRA to our format."""
    from rflow_jax.weights.lora.export import save_lora

    adapters = _read_lora(config)
    file = save_lora(adapters, Path(config.dst))
    ranks = sorted({adapter.rank for adapter in adapters.values()})
    print(f"{file}: {len(adapters)} linears, rank {', '.join(map(str, ranks))}")


def export_lora(config: LoraExport) -> None:
    """Writes a LoRA as diffusers does."""
    from rflow_jax.weights.lora.export import export_lora as export

    adapters = _read_lora(config)
    file = export(adapters, Path(config.dst), fold_alpha=config.fold_alpha)
    print(f"{file}: {2 * len(adapters)} tensors")


def pack(config: Packing) -> None:
    """Writes a packed folder."""
    from rflow_jax.weights.packed import pack_folder

    src = Path(config.src)
    if not src.is_dir():
        raise InputError(f"{src}: no such folder")
    print(f"{config.dst}: {pack_folder(src, Path(config.dst), config.made):,} bytes")


_CONVERSIONS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "convert flux": (FluxConversion, flux),
    "convert qwen": (QwenConversion, qwen),
    "convert nvila": (NvilaConversion, nvila),
    "convert lora": (LoraConversion, lora),
    "convert export-lora": (LoraExport, export_lora),
    "convert pack": (Packing, pack),
}


def _numpy_dtype(name: Dtype | None) -> Any:
    """numpy's dtype; None: each tensor keeps its own."""
    import ml_dtypes  # noqa: F401 (numpy knows bfloat16 by its name once this is imported)
    import numpy as np

    return None if name is None else np.dtype(name)


def _read_lora(config: LoraConversion) -> Any:
    from rflow_jax.weights.hub import resolve_lora
    from rflow_jax.weights.lora.read import read_lora

    return read_lora(
        resolve_lora(config.src),
        alpha=config.alpha,
        ignore_text_encoder=config.ignore_text_encoder,
        allow_pickle=config.allow_pickle,
    )


class _Progress:
    """A bar in bytes on standard error."""

    def __enter__(self) -> _Progress:
        from rflow_jax.utils.progress import byte_progress

        self._bar = byte_progress()
        self._bar.start()
        self._task = self._bar.add_task("reading")
        return self

    def __call__(self, network: str, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total, description=f"converting {network}")

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
