"""``python -m rflow_jax.parallel.aot``: does a recipe fit a TPU topology? Compiled for it on this machine's CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rflow_jax import cli
from rflow_jax.aot.topology import require_libtpu, require_topology
from rflow_jax.errors import InputError, RunError

What = Literal["train", "sample", "verifier"]
HELP = "Compile a recipe's real programs for a TPU topology on this CPU, and say what they take of each chip."
CHILD = "rflow_jax.aot.child"
_LEAST_EFFORT = "-1.0"
_TAIL = 30


@dataclass(frozen=True)
class CompileConfig:
    """What is compiled, and for which devices.

    Attributes:
        topology: generation and chips (not cores): v5p:2x2x1, v5e:4x4, v6e:16x16 and so on.
        what: ``train`` (encoders and step), ``sample`` (encoders and images) or ``verifier`` (the models that judge and
            write); null: train for a training recipe, else sample.
        blocks: D,S: so many double and single blocks of FLUX (D layers of other networks), for a quick check.
        slices: so many of the topology, joined by the data-centre network.
        effort: of the compiler: ``least`` is quicker and needs more memory, so what fits with it fits; ``default``.
        json: a file for the results.
    """

    topology: str
    what: What | None = None
    blocks: str | None = None
    slices: int = 1
    effort: Literal["least", "default"] = "least"
    json: str | None = None

    def __post_init__(self) -> None:
        require_topology(self.topology)
        if self.slices < 1:
            raise InputError(f"slices is {self.slices}: give at least 1")
        _ = self.block_counts

    @property
    def block_counts(self) -> tuple[int, int] | None:
        """Double and single blocks; None: the model's own."""
        if self.blocks is None:
            return None
        counts = self.blocks.split(",")
        if len(counts) != 2 or not all(count.strip().isdecimal() and int(count) for count in counts):
            raise InputError(
                f"blocks is {self.blocks!r}: give two numbers from 1, double and single blocks, such as 2,2"
            )
        return int(counts[0]), int(counts[1])


def main(argv: Sequence[str] | None = None) -> int:
    """Checks the command line, and compiles in a process of its own; returns the exit status."""
    words = named_recipe(sys.argv[1:] if argv is None else argv)
    cli.run_command(command(words, lambda *_: None), words)
    require_libtpu()
    if (file := cli.early_value(words, "json", "")) and (Path(file).is_dir() or not Path(file).parent.is_dir()):
        raise InputError(f"json {file}: give a file in a folder that is there")
    effort = cli.early_value(words, "effort", "least")
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.run(
            [sys.executable, "-m", CHILD, *words], env=_environment(effort), stderr=said, check=False
        )
        said.seek(0)
        lines = said.read().splitlines()
    if child.returncode in (0, 1) and not any(line.startswith("Traceback") for line in lines):
        for warning in dict.fromkeys(line for line in lines if line.startswith("warning: ")):
            print(warning, file=sys.stderr)
        return child.returncode
    # libtpu says much besides; a line of ours is what counts.
    if ours := next((line for line in lines if line.startswith("error: ")), None):
        raise InputError(ours.removeprefix("error: "))
    print(*lines[-_TAIL:], sep="\n", file=sys.stderr)
    raise RunError(f"the compiler ended with status {child.returncode}; its last lines are above")


def command(words: Sequence[str], run: Callable[..., int | None]) -> cli.Command:
    """The command for the kind of recipe that the words name; ``run`` gets its configurations."""
    what = cli.early_value(words, "what", "") or None
    trains = _is_training(words)
    if what is not None and cli.early_value(words, "model", "") and trains != (what == "train"):
        other = "a training recipe: give train" if trains else "a search's recipe: give sample or verifier"
        raise InputError(f"what is {what}, but this is {other}, or leave it out")
    if trains or what == "train":
        from rflow_jax.training.task import DEFAULT, config_of

        return cli.Command(HELP, (CompileConfig, config_of(cli.early_value(words, "task", DEFAULT))), run)
    from rflow_jax.search.config import SearchConfig

    return cli.Command(HELP, (CompileConfig, SearchConfig), run)


def named_recipe(argv: Sequence[str]) -> list[str]:
    """The words, with the name of a recipe of this project replaced by its file."""
    words = list(argv)
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag == "--config" and equals:
            words[place] = f"--config={_recipe(value)}"
        elif word == "--config" and place + 1 < len(words):
            words[place + 1] = _recipe(words[place + 1])
    return words


def _recipe(name: str) -> str:
    if Path(name).exists() or "/" in name:
        return name
    beside = Path(__file__).parents[2] / "configs"
    for folder in (Path("configs"), beside):
        if (file := folder / f"{name.removesuffix('.yaml')}.yaml").is_file():
            return str(file)
    known = sorted(file.stem for file in beside.glob("*.yaml"))
    near = f"; did you mean {cli.nearest(name, known)}?" if known else ""
    raise InputError(f"config {name}: no such file, and no recipe of this name{near}")


def _is_training(words: Sequence[str]) -> bool:
    return any(cli.early_value(words, key, "") for key in ("task", "train", "data"))


def _environment(effort: str) -> dict[str, str]:
    """Of a process that compiles for TPUs and has none."""
    own = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if effort == "least":
        own["JAX_EXEC_TIME_OPTIMIZATION_EFFORT"] = _LEAST_EFFORT
    # What was compiled for another purpose must not be counted, and fake devices only take time to make.
    dropped = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")
    return {key: value for key, value in os.environ.items() if key not in dropped} | own
