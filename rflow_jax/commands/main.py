"""``rflow``: every command by its name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import NamedTuple

from rflow_jax.errors import InputError
from rflow_jax.utils import cli
from rflow_jax.utils.checks import nearest


class Entry(NamedTuple):
    """A command: the module whose ``command(name, argv)`` makes it, and one sentence about it."""

    module: str
    help: str


COMMANDS = {
    "generate": Entry("rflow_jax.commands.generate", "Generate images of one prompt."),
    "noise": Entry("rflow_jax.commands.search", "Search over images from fresh noise."),
    "noise-prompt": Entry("rflow_jax.commands.search", "Refine each branch's prompt from image to image."),
    "reflect": Entry("rflow_jax.commands.search", "Correct the best images round by round."),
    "filter": Entry("rflow_jax.commands.filter", "Choose the best of a search's first k images."),
    "report": Entry("rflow_jax.commands.report", "Show searches on one page."),
    "score": Entry("rflow_jax.commands.score", "Score existing images."),
    "pairs": Entry("rflow_jax.commands.pairs", "Correct known bad images, beside the good ones."),
    "train": Entry("rflow_jax.commands.train", "Train a corrector, an image verifier or a reflection generator."),
    "convert flux": Entry("rflow_jax.commands.convert", "A FLUX model of diffusers or Black Forest Labs to ours."),
    "convert qwen": Entry("rflow_jax.commands.convert", "A Qwen2.5-VL of Transformers to ours."),
    "convert nvila": Entry("rflow_jax.commands.convert", "A published NVILA checkpoint to ours."),
    "convert lora": Entry("rflow_jax.commands.convert", "A LoRA of any common format to ours."),
    "convert export-lora": Entry("rflow_jax.commands.convert", "A LoRA of any common format to diffusers'."),
    "convert pack": Entry("rflow_jax.commands.convert", "Pack a small model's folder, to ship it."),
    "data genref": Entry("rflow_jax.testing.make_genref", "Write small valid shards of GenRef, to try the training."),
    "data chats": Entry("rflow_jax.commands.dataset", "Write GenRef's reflections as chats."),
    "data tfds": Entry("rflow_jax.commands.dataset", "Write tar shards as a data set of TensorFlow Datasets."),
    "data precompute": Entry("rflow_jax.commands.dataset", "Encode records once, for training without encoders."),
    "shapes model": Entry("rflow_jax.commands.shapes", "Write a small untrained FLUX for the world of colored shapes."),
    "shapes verifier": Entry("rflow_jax.commands.shapes", "Write a small untrained Qwen2.5-VL for that world."),
    "shapes pairs": Entry("rflow_jax.commands.shapes", "Write pairs as GenRef's for that world, to train a corrector."),
    "shapes questions": Entry("rflow_jax.commands.shapes", "Write chats about its pictures, to train a verifier."),
    "shapes scaling": Entry("rflow_jax.commands.shapes", "Measure what more images bring, by ways to spend them."),
    "compile": Entry("rflow_jax.commands.compile", "Compile a recipe for a TPU topology on this CPU: does it fit?"),
    "parity": Entry("rflow_jax.commands.parity", "Compare with recordings of the original, array by array."),
    "configs": Entry("rflow_jax.commands.configs", "List the recipes of the package."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first words name; returns its exit status.

    Raises:
        InputError: there is no such command, or its command line is not usable.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in ("-V", "--version"):
        print(f"rflow_jax {version('rflow_jax')}")
        return 0
    group = argv[0] if argv and any(name.startswith(f"{argv[0]} ") for name in COMMANDS) else ""
    length = 2 if group else 1
    if len(argv) < length:
        raise InputError(f"give a command: {', '.join(name for name in COMMANDS if name.startswith(group))}")
    if argv[length - 1] in ("-h", "--help"):
        print(overview(group))
        return 0
    name = " ".join(argv[:length])
    if name not in COMMANDS:
        known = [known for known in COMMANDS if known.startswith(group)]
        raise InputError(f"unknown command {name}: did you mean {nearest(name, known)}? rflow --help lists all")
    entry = COMMANDS[name]
    command = import_module(entry.module).command(name, argv[length:])
    return cli.run_command(command, argv[length:], prog=f"rflow {name}", description=entry.help) or 0


def overview(group: str = "") -> str:
    """The help of ``rflow``, or of a group of its commands such as ``convert``."""
    shown = {name: entry.help for name, entry in COMMANDS.items() if name.startswith(group)}
    width = max(map(len, shown))
    return "\n".join(
        [
            f"usage: rflow {group or 'COMMAND'} ...",
            "",
            "ReflectionFlow in JAX: generate images, search over them, train the corrector.",
            "",
            *(f"  {name:<{width}}  {text}" for name, text in shown.items()),
            "",
            "rflow COMMAND --help explains one of them.",
        ]
    )


def console() -> None:
    """The console script: ends the process with the exit status."""
    sys.exit(cli.run(main))


if __name__ == "__main__":
    console()
