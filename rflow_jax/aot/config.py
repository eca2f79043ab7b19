"""The configuration of ``rflow compile``, and the kind of recipe that goes with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rflow_jax.aot.chips import require_topology
from rflow_jax.errors import InputError
from rflow_jax.utils import cli
from rflow_jax.utils.ranges import Devices, require_ranges

What = Literal["train", "sample", "verifier"]


@dataclass(frozen=True)
class CompileConfig:
    """The programs to compile, and the devices.

    Attributes:
        topology: generation and chips (not cores): v5p:2x2x1, v5e:4x4, v6e:16x16 and so on.
        what: ``train`` (encoders and step), ``sample`` (encoders and images) or ``verifier`` (the models that judge and
            write); null: train for a training recipe, else sample.
        blocks: D,S: numbers of double and single blocks of FLUX (D layers of other networks), for a quick check.
        slices: number of such slices, joined by the data-centre network.
        effort: of the compiler: ``least`` is quicker and needs more memory, so what fits with it fits; ``default``.
        json: a file for the results.
    """

    topology: str
    what: What | None = None
    blocks: str | None = None
    slices: Devices = 1
    effort: Literal["least", "default"] = "least"
    json: str | None = None

    def __post_init__(self) -> None:
        require_topology(self.topology)
        require_ranges(self)
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


def command_for(words: Sequence[str], run: Callable[..., int | None]) -> cli.Command:
    """The command for the kind of recipe that the words name; ``run`` gets its configurations."""
    what = cli.early_value(words, "what", "") or None
    trains = any(cli.early_value(words, key, "") for key in ("task", "train", "data"))
    if what is not None and cli.early_value(words, "model", "") and trains != (what == "train"):
        other = "a training recipe: give train" if trains else "a search's recipe: give sample or verifier"
        raise InputError(f"what is {what}, but this is {other}, or leave it out")
    if trains or what == "train":
        from rflow_jax.training.config import DEFAULT_TASK, config_class

        return cli.Command((CompileConfig, config_class(cli.early_value(words, "task", DEFAULT_TASK))), run)
    from rflow_jax.search.config import SearchConfig

    return cli.Command((CompileConfig, SearchConfig), run)
