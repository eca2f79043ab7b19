"""Compiles programs, and reports memory, traffic and time of each."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rflow_jax.aot.chips import Chip, chip_of, topology_devices
from rflow_jax.aot.config import CompileConfig, command_for
from rflow_jax.aot.estimate import StepEstimate, compared, estimate
from rflow_jax.aot.hlo import Program, read_program
from rflow_jax.aot.program import AheadProgram
from rflow_jax.errors import InputError
from rflow_jax.utils import cli

_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
_USED = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
_GIB = 2**30
_MAIN = ("step", "sample")  # the program that most of the time is spent in


@dataclass(frozen=True)
class Compiled:
    """The result of compiling one program.

    Attributes:
        fits: it compiled, and its peak and the resident bytes are within the memory.
        bytes_per_chip: its peak and the resident bytes; where the compiler gave up, the memory it asked for, or None.
        compile_seconds: processor time of all threads: tracing, lowering and compiling.
        error: the compiler's message where it gave up.
    """

    name: str
    fits: bool
    bytes_per_chip: int | None
    peak_bytes: int | None
    argument_bytes: int | None
    temporary_bytes: int | None
    resident_bytes: int
    compile_seconds: float
    wall_seconds: float
    flops: float
    whole: list[tuple[str, int]]
    collectives: Program | None = None
    estimate: StepEstimate | None = None
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        found = {key: value for key, value in vars(self).items() if key not in ("collectives", "estimate")}
        found["collectives"] = None if self.collectives is None else self.collectives.as_json()
        found["estimate"] = None if self.estimate is None else self.estimate.as_json()
        return found


def compile_program(program: AheadProgram, chip: Chip | None) -> Compiled:
    """Compiles one program for the devices it is lowered for.

    Raises the compiler's errors, except those for lack of memory.
    """
    wall, cpu = time.perf_counter(), time.process_time()

    def spent() -> dict[str, float]:
        return {"compile_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}

    common = {"name": program.name, "resident_bytes": program.resident_bytes}
    common |= {"flops": program.flops, "whole": program.whole}
    try:
        compiled = program.lower().compile()
    except Exception as error:
        if _OUT_OF_MEMORY not in str(error):
            raise
        used = _USED.search(str(error))
        total = None if used is None else int(float(used[1]) * _UNITS[used[2]]) + program.resident_bytes
        unknown = dict.fromkeys(("peak_bytes", "argument_bytes", "temporary_bytes"))
        failed = {"fits": False, "bytes_per_chip": total}
        failed["error"] = " ".join(str(error).split("\n\n")[0].split())[:500]
        return Compiled(**common, **unknown, **failed, **spent())  # pyright: ignore[reportArgumentType]
    times = spent()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    peak = int(memory.peak_memory_in_bytes)
    collectives = read_program(text)
    total = peak + program.resident_bytes
    limit = None if chip is None else chip.hbm_bytes_a_device
    return Compiled(
        **common,  # pyright: ignore[reportArgumentType]
        fits=limit is None or total <= limit,
        bytes_per_chip=total,
        peak_bytes=peak,
        argument_bytes=int(memory.argument_size_in_bytes),
        temporary_bytes=int(memory.temp_size_in_bytes),
        collectives=collectives,
        estimate=None if chip is None else _estimate(program, chip, collectives),
        **times,  # pyright: ignore[reportArgumentType]
    )


def _estimate(program: AheadProgram, chip: Chip, collectives: Program) -> StepEstimate:
    chips = max(1, program.devices // chip.devices)
    links = {"ici_bytes": collectives.ici_bytes * chip.devices, "dcn_bytes": collectives.dcn_bytes * chip.devices}
    return estimate(chip, chips, program.flops, hbm_bytes=program.hbm_bytes, **links)


class Report:
    """The programs of one recipe on one topology.

    Args:
        recipe: its configuration.
        chip: published rates of the chips; None: unknown.
        devices: number of JAX devices.
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
        self.compiled.append(compiled)

    @property
    def fits(self) -> bool:
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
        """The largest of the programs; None where the compiler does not say."""
        sizes = [one.bytes_per_chip for one in self.compiled]
        return None if None in sizes else max(size or 0 for size in sizes) * self.devices_a_chip

    def headline(self) -> str:
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
        """One program in a line, and below it the traffic between chips."""
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
        """Whether everything fits, and how reliable the times are."""
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
        main = next((one for one in self.compiled if one.name in _MAIN), self.compiled[-1])
        kinds = {} if main.collectives is None else main.collectives.by_kind()
        keys = ("count", "ici_bytes", "dcn_bytes")
        return {
            "fits": self.fits,
            "bytes_per_chip": self.bytes_per_chip,
            "hbm_bytes": self.hbm_bytes,
            "compile_seconds": sum(one.compile_seconds for one in self.compiled),
            "collectives": {kind: {key: getattr(row, key) for key in keys} for kind, row in kinds.items()},
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


def run(config: CompileConfig, recipe: Any) -> int:
    """Compiles every program; the exit status is 0 if all fit, else 1."""
    devices = topology_devices(config.topology, config.slices)
    chip = chip_of(devices[0].device_kind)
    programs, mesh = programs_of(config, recipe, devices)
    if not programs:
        raise InputError("verifier: every model of this configuration answers over HTTP or is a class of your own")
    made_with = {name: version(name) for name in ("jax", "libtpu")}
    report = Report(config, recipe, chip, len(devices), mesh, made_with)
    print(report.headline(), flush=True)
    for program in programs:
        compiled = compile_program(program, chip)
        report.add(compiled)
        print(report.row(compiled), flush=True)
    print(report.summary(), flush=True)
    if config.json is not None:
        Path(config.json).write_text(json.dumps(report.as_json(), indent=2) + "\n")
    return 0 if report.fits else 1


def programs_of(config: CompileConfig, recipe: Any, devices: Any) -> tuple[list[AheadProgram], dict[str, int]]:
    """The programs of the recipe, and the axes of its mesh."""
    from rflow_jax.parallel.mesh import make_mesh
    from rflow_jax.search.config import SearchConfig

    layers = config.block_counts and config.block_counts[0]
    if not isinstance(recipe, SearchConfig):
        from rflow_jax.aot.training import qwen_training_programs, training_programs

        mesh = make_mesh(recipe.mesh, devices)
        if recipe.task == "corrector":
            return training_programs(recipe, mesh, blocks=config.block_counts), dict(mesh.shape)
        return qwen_training_programs(recipe, mesh, layers=layers), dict(mesh.shape)
    if config.what == "verifier":
        from rflow_jax.aot.verifiers import verifier_programs

        return verifier_programs(recipe, devices, layers=layers), {}
    from rflow_jax.aot.sampling import sampling_mesh, sampling_programs

    mesh = sampling_mesh(recipe, devices)
    return sampling_programs(recipe, devices, mesh, blocks=config.block_counts), dict(mesh.shape)


def main() -> int | None:
    """The command line, as ``rflow_jax.commands.compile`` checked it."""
    # The prefix by which the parent tells these warnings from libtpu's output.
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING)
    words = sys.argv[1:]
    return cli.run_command(command_for(words, run), words)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
