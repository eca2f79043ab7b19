"""Compiles programs, and says of each what it takes."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

from rflow_jax.aot.chips import Chip
from rflow_jax.aot.estimate import StepEstimate, estimate
from rflow_jax.aot.hlo import Program, read_program
from rflow_jax.aot.program import AheadProgram

_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
_USED = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Compiled:
    """What became of one program.

    Attributes:
        fits: it compiled, and its peak and what is resident beside it are within the memory.
        bytes_per_chip: its peak and the resident bytes; where the compiler gave up, what it says it needs, or None.
        compile_seconds: of the processor, all threads together: tracing, lowering and compiling.
        wall_seconds: of the clock.
        error: what the compiler says where it gave up.
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
        """Everything, for other programs."""
        found = {key: value for key, value in vars(self).items() if key not in ("collectives", "estimate")}
        found["collectives"] = None if self.collectives is None else self.collectives.as_json()
        found["estimate"] = None if self.estimate is None else self.estimate.as_json()
        return found


def compile_program(program: AheadProgram, chip: Chip | None) -> Compiled:
    """Compiles one program for the devices it is lowered for.

    Raises whatever the compiler raises, but for want of memory.
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
        needed = _needed(str(error))
        total = None if needed is None else needed + program.resident_bytes
        nothing = dict.fromkeys(("peak_bytes", "argument_bytes", "temporary_bytes"))
        how = {"fits": False, "bytes_per_chip": total, "error": _first_lines(str(error))}
        return Compiled(**common, **nothing, **how, **spent())  # pyright: ignore[reportArgumentType]
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


def _needed(message: str) -> int | None:
    """The bytes that a compiler says a program would use."""
    found = _USED.search(message)
    return None if found is None else int(float(found[1]) * _UNITS[found[2]])


def _first_lines(message: str) -> str:
    return " ".join(message.split("\n\n")[0].split())[:500]
