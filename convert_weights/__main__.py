"""Converts PyTorch's checkpoints to ours, and LoRA both ways: ``python -m convert_weights flux|lora|nvila|...``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from rflow_jax.cli import plain, run
from rflow_jax.errors import InputError

DTYPES = ("bfloat16", "float16", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status; raises InputError for a bad command line."""
    parser, commands = _parsers()
    try:
        parsed = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    except ArgumentError as error:
        raise InputError(plain(error)) from error
    return commands[parsed.command](parsed[parsed.command])


def flux(args: Namespace) -> int:
    """A model: a diffusers folder or Black Forest Labs' single files -> a folder of ours."""
    from rflow_jax.weights.convert import Options, convert_flux
    from rflow_jax.weights.hub import resolve

    options = Options(
        storage=args.format,
        dtype=_dtype(args.dtype),
        allow_pickle=args.allow_pickle,
        ae=args.ae and Path(args.ae),
        text=args.text and Path(args.text),
    )
    src = resolve(args.src)
    with _Progress() as progress:
        convert_flux(src, Path(args.dst), options, progress)
    print(f"{args.dst}: converted")
    return 0


def nvila(args: Namespace) -> int:
    """NVILA: a published checkpoint (llm, vision_tower, mm_projector) -> a folder of ours."""
    from rflow_jax.weights.convert import Options
    from rflow_jax.weights.hub import resolve
    from rflow_jax.weights.nvila import WANTED, convert_nvila

    options = Options(storage=args.format, dtype=_dtype(args.dtype), allow_pickle=args.allow_pickle)
    src = resolve(args.src, WANTED)
    with _Progress() as progress:
        convert_nvila(src, Path(args.dst), options, progress)
    print(f"{args.dst}: converted")
    return 0


def qwen(args: Namespace) -> int:
    """A Qwen2.5-VL: a folder of Transformers (or a Hub id) -> a folder of ours."""
    from rflow_jax.weights.convert_qwen import convert_qwen
    from rflow_jax.weights.hub import resolve_vlm

    src = resolve_vlm(args.src)
    with _Progress() as progress:
        convert_qwen(src, Path(args.dst), storage=args.format, dtype=_dtype(args.dtype), on_progress=progress)
    print(f"{args.dst}: converted")
    return 0


def lora(args: Namespace) -> int:
    """A LoRA file of any common format -> ours."""
    from rflow_jax.weights.lora.export import save_lora

    adapters = _read_lora(args)
    file = save_lora(adapters, Path(args.dst))
    ranks = sorted({adapter.rank for adapter in adapters.values()})
    print(f"{file}: {len(adapters)} linears, rank {', '.join(map(str, ranks))}")
    return 0


def export_lora(args: Namespace) -> int:
    """A LoRA of ours (or of any format) -> diffusers' ``pytorch_lora_weights.safetensors``."""
    from rflow_jax.weights.lora.export import export_lora as export

    adapters = _read_lora(args)
    file = export(adapters, Path(args.dst), fold_alpha=args.fold_alpha)
    print(f"{file}: {2 * len(adapters)} tensors")
    return 0


def verify(args: Namespace) -> int:
    """Compares with recordings of the original, array by array."""
    from convert_weights.verify import main as verify_main

    return verify_main(args.dir)


def _dtype(name: str | None):
    """numpy's dtype; None: each tensor keeps its own."""
    import numpy as np
    from ml_dtypes import bfloat16

    return None if name is None else np.dtype(bfloat16) if name == "bfloat16" else np.dtype(name)


def _read_lora(args: Namespace):
    from rflow_jax.weights.lora.files import read_lora

    return read_lora(
        args.src,
        alpha=args.alpha,
        ignore_text_encoder=args.ignore_text_encoder,
        allow_pickle=args.allow_pickle,
    )


def _parsers() -> tuple[ArgumentParser, dict[str, Callable[[Namespace], int]]]:
    parser = ArgumentParser(prog="python -m convert_weights", description=__doc__, exit_on_error=False)
    subcommands = parser.add_subcommands(dest="command", required=True)
    commands = {
        "flux": flux,
        "qwen": qwen,
        "nvila": nvila,
        "lora": lora,
        "export-lora": export_lora,
        "verify": verify,
    }
    for name, command in commands.items():
        sub = ArgumentParser(description=command.__doc__, exit_on_error=False)
        if name == "verify":
            sub.add_argument("dir", help="folder laid out like tests/golden")
        else:
            _add_paths(sub)
        if name in ("flux", "qwen", "nvila"):
            _add_storage(sub)
        if name in ("flux", "nvila", "lora", "export-lora"):
            _add_allow_pickle(sub)
        if name == "flux":
            _add_flux(sub)
        if name in ("lora", "export-lora"):
            _add_lora(sub)
        if name == "export-lora":
            sub.add_argument(
                "--fold_alpha",
                "--fold-alpha",
                action="store_true",
                help="multiply alpha / rank into B, for readers that ignore the file's header",
            )
        subcommands.add_subcommand(name, sub, help=" ".join((command.__doc__ or "").split()))
    return parser, commands


def _add_paths(parser: ArgumentParser) -> None:
    parser.add_argument("src", help="what to read")
    parser.add_argument("dst", help="what to write; must not exist")


def _add_storage(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=("safetensors", "orbax"), default="safetensors", help="how to store parameters"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of all parameters; without it each keeps its own")


def _add_flux(parser: ArgumentParser) -> None:
    parser.add_argument("--ae", help="for single files: ae.safetensors")
    parser.add_argument("--text", help="for single files: a diffusers folder with text encoders and tokenizers")


def _add_lora(parser: ArgumentParser) -> None:
    parser.add_argument("--alpha", type=float, help="where the file does not say it; the rank without this")
    parser.add_argument(
        "--ignore_text_encoder",
        "--ignore-text-encoder",
        action="store_true",
        help="leave out what is for a text encoder",
    )


def _add_allow_pickle(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--allow_pickle",
        action="store_true",
        help="read PyTorch's .bin and .pth files, by torch with weights_only",
    )


class _Progress:
    """A bar in bytes on standard error."""

    def __enter__(self) -> _Progress:
        from rflow_jax.progress import byte_progress

        self._bar = byte_progress()
        self._bar.start()
        self._task = self._bar.add_task("reading")
        return self

    def __call__(self, network: str, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total, description=f"converting {network}")

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


if __name__ == "__main__":
    sys.exit(run(main))
