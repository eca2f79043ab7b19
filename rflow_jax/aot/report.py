"""What was compiled, as lines for a reader and as JSON for programs."""

from __future__ import annotations

from typing import Any

from rflow_jax.aot.chips import Chip
from rflow_jax.aot.command import CompileConfig
from rflow_jax.aot.compile import Compiled
from rflow_jax.aot.estimate import compared

_GIB = 2**30
_MAIN = ("step", "sample")  # the program that most of the time is spent in


class Report:
    """The programs of one recipe on one topology.

    Args:
        recipe: its configuration.
        chip: what is published of the chips; None: nothing is known of them.
        devices: JAX's.
        mesh: axis -> devices.
        made_with: package -> version.
    """

    def __init__(
        self,
        config: CompileConfig,
        recipe: Any,
        chip: Chip | None,
        devices: int,
        mesh: dict[str, int],
        made_with: dict[str, str],
    ):
        self.config, self.recipe, self.chip, self.mesh, self.made_with = config, recipe, chip, mesh, made_with
        self.devices = devices
        self.compiled: list[Compiled] = []

    def add(self, compiled: Compiled) -> None:
        """One more program."""
        self.compiled.append(compiled)

    @property
    def fits(self) -> bool:
        """Whether every program does."""
        return all(one.fits for one in self.compiled)

    @property
    def devices_a_chip(self) -> int:
        return 1 if self.chip is None else self.chip.devices

    @property
    def hbm_bytes(self) -> int | None:
        """A chip's memory as its compiler counts it."""
        if self.chip is None or self.chip.hbm_bytes_a_device is None:
            return None
        return self.chip.hbm_bytes_a_device * self.chip.devices

    @property
    def bytes_per_chip(self) -> int | None:
        """Of the program that takes most; None where the compiler does not say."""
        sizes = [one.bytes_per_chip for one in self.compiled]
        return None if None in sizes else max(size or 0 for size in sizes) * self.devices_a_chip

    def headline(self) -> str:
        """What is compiled for what."""
        axes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1) or "no mesh"
        slices = f"{self.config.slices} slices of " if self.config.slices > 1 else ""
        blocks = "" if self.config.blocks is None else f"; only {self.config.blocks} blocks"
        chips = self.devices // self.devices_a_chip
        made = ", ".join(f"{name} {number}" for name, number in self.made_with.items())
        return (
            f"{slices}{self.config.topology}, {chips} chip{'s' if chips > 1 else ''}; {axes}{blocks}; {made}, "
            f"effort {self.config.effort}\n"
            "program   fits  GiB a chip (peak + beside)  CPU s   TFLOP  sent a chip, GB  bound, s"
        )

    def row(self, one: Compiled) -> str:
        """One program in a line, and below it what moves between chips."""
        peak, beside = ("?" if size is None else f"{size / _GIB:.2f}" for size in (one.peak_bytes, one.resident_bytes))
        total = "?" if one.bytes_per_chip is None else f"{one.bytes_per_chip / _GIB:.2f}"
        sent = (
            "-" if one.collectives is None else f"{(one.collectives.ici_bytes + one.collectives.dcn_bytes) / 1e9:.2f}"
        )
        bound = "-" if one.estimate is None else f"{one.estimate.seconds:.3f} ({one.estimate.bound})"
        lines = [
            f"{one.name:9s} {'yes' if one.fits else 'NO':4s}  {total:>6s} ({peak} + {beside})".ljust(44)
            + f"{one.compile_seconds:6.0f}  {one.flops / 1e12:6.0f}  {sent:>15s}  {bound}"
        ]
        if one.error is not None:
            lines.append(f"  {one.error}")
        if one.collectives is not None:
            kinds = one.collectives.by_kind().items()
            moved = (f"{kind} {row.count} x, {(row.ici_bytes + row.dcn_bytes) / 1e9:.2f} GB" for kind, row in kinds)
            if text := "; ".join(moved):
                lines.append(f"  {text}")
        if one.whole:
            size = sum(nbytes for _, nbytes in one.whole)
            lines.append(
                f"  whole on every chip: {len(one.whole)} parameters, {size / 2**20:.1f} MiB, such as {one.whole[0][0]}"
            )
        return "\n".join(lines)

    def summary(self) -> str:
        """Whether it fits, and what the times are worth."""
        total, limit = self.bytes_per_chip, self.hbm_bytes
        used = "more" if total is None else f"{total / _GIB:.2f} GiB"
        of = "" if limit is None else f" of {limit / _GIB:.2f} GiB a chip"
        ratios = [row.ratio for row in compared()]
        return (
            f"{'fits' if self.fits else 'does NOT fit'}: {used}{of}\n"
            "bound: the least that a program can take by published rates, everything at once. TPU times are "
            f"unverified; measured steps of H100 and H200 take {min(ratios):.1f} to {max(ratios):.1f} times their bound"
        )

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        main = next((one for one in self.compiled if one.name in _MAIN), self.compiled[-1])
        return {
            "fits": self.fits,
            "bytes_per_chip": self.bytes_per_chip,
            "hbm_bytes": self.hbm_bytes,
            "compile_seconds": sum(one.compile_seconds for one in self.compiled),
            "collectives": _by_kind(main),
            "topology": self.config.topology,
            "slices": self.config.slices,
            "chips": self.devices // self.devices_a_chip,
            "mesh": self.mesh,
            "model": self.recipe.model,
            "blocks": self.config.block_counts,
            "effort": self.config.effort,
            "versions": self.made_with,
            "estimate": None if main.estimate is None else main.estimate.as_json(),
            "measured": [comparison._asdict() for comparison in compared()],
            "chip": None if self.chip is None else self.chip.as_json(),
            "programs": [one.as_json() for one in self.compiled],
        }


def _by_kind(one: Compiled) -> dict[str, dict[str, float]]:
    """Kind of collective -> how many there are in a step, and the bytes a chip sends."""
    if one.collectives is None:
        return {}
    kinds = one.collectives.by_kind().items()
    return {kind: {"count": row.count, "ici_bytes": row.ici_bytes, "dcn_bytes": row.dcn_bytes} for kind, row in kinds}
