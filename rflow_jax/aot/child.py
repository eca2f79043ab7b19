"""The process that loads libtpu, started by ``rflow_jax.aot.command``: compiles, prints the report, writes JSON."""

from __future__ import annotations

import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rflow_jax import cli
from rflow_jax.aot.chips import chip_of
from rflow_jax.aot.command import CompileConfig, command
from rflow_jax.aot.compile import compile_program
from rflow_jax.aot.program import AheadProgram
from rflow_jax.aot.report import Report
from rflow_jax.aot.topology import topology_devices
from rflow_jax.errors import InputError


def run(config: CompileConfig, recipe: Any) -> int:
    """Compiles every program; the exit status is 0 where all fit and 1 where one does not."""
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
    """What the recipe compiles, and the axes of its mesh."""
    from rflow_jax.parallel.mesh import make_mesh
    from rflow_jax.search.config import SearchConfig

    if not isinstance(recipe, SearchConfig):
        mesh = make_mesh(recipe.mesh, devices)
        if recipe.task == "corrector":
            from rflow_jax.aot.training import training_programs

            return training_programs(recipe, mesh, blocks=config.block_counts), dict(mesh.shape)
        from rflow_jax.aot.qwen_training import qwen_training_programs

        layers = config.block_counts and config.block_counts[0]
        return qwen_training_programs(recipe, mesh, layers=layers), dict(mesh.shape)
    if config.what == "verifier":
        from rflow_jax.aot.verifiers import verifier_programs

        return verifier_programs(recipe, devices, layers=config.block_counts and config.block_counts[0]), {}
    from rflow_jax.aot.sampling import sampling_mesh, sampling_programs

    mesh = sampling_mesh(recipe, devices)
    return sampling_programs(recipe, devices, mesh, blocks=config.block_counts), dict(mesh.shape)


def main() -> int | None:
    """The command line, as ``rflow_jax.aot.command`` checked it."""
    # What the parent tells apart from all that libtpu says.
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING)
    words = sys.argv[1:]
    return cli.run_command(command(words, run), words)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
