"""The compile command's own work: its words, what fits, and what is written; compiled for this CPU."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rflow_jax.aot.chips import V5E
from rflow_jax.aot.config import CompileConfig, command_for
from rflow_jax.aot.program import AheadProgram, bytes_on_a_device
from rflow_jax.aot.report import Report, compile_program
from rflow_jax.commands.main import main
from rflow_jax.errors import InputError
from rflow_jax.search.config import SearchConfig
from rflow_jax.training.config import CorrectorRunConfig
from rflow_jax.utils import cli

ROOT = Path(__file__).parents[3]
RECIPES = sorted(
    file.stem for file in (ROOT / "configs").glob("*.yaml") if "debug" not in file.stem and "shapes" not in file.stem
)


@pytest.fixture
def program():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    return AheadProgram("step", lambda: jax.jit(lambda x: x @ x).lower(x), 1, resident_bytes=1000, flops=2.0 * 256**3)


def test_fits_counts_what_lies_beside_the_program(program):
    roomy = dataclasses.replace(V5E, hbm_bytes=10**7)
    found = compile_program(program, roomy)
    assert found.fits
    assert found.bytes_per_chip == found.peak_bytes + 1000
    full = dataclasses.replace(V5E, hbm_bytes=found.bytes_per_chip - 1)
    assert not compile_program(program, full).fits


def test_running_out_of_memory_is_an_answer(program):
    def lower():
        raise RuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory. Used 18.50G of 15.75G hbm. Exceeded by 2.75G.\n\nTotal"
        )

    found = compile_program(dataclasses.replace(program, lower=lower), V5E)
    assert not found.fits
    assert found.bytes_per_chip == int(18.5 * 2**30) + 1000
    assert "Ran out of memory" in found.error
    with pytest.raises(ValueError, match="another"):
        compile_program(dataclasses.replace(program, lower=lambda: (_ for _ in ()).throw(ValueError("another"))), V5E)


def test_the_report_as_json(program):
    config = CompileConfig("v5e:1x1", what="sample")
    report = Report(config, SearchConfig(model="m"), V5E, 1, {"data": 1}, {"jax": "0"})
    report.add(compile_program(program, V5E))
    found = report.as_json()
    assert found["fits"] is report.fits is True
    assert found["bytes_per_chip"] == report.compiled[0].bytes_per_chip
    assert found["hbm_bytes"] == V5E.hbm_bytes
    assert found["compile_seconds"] > 0
    assert found["collectives"] == {}
    assert "of 15.75 GiB a chip" in report.summary()


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["--config", "corrector_v5e_16"], CorrectorRunConfig),
        (["--config=search_v5e_8"], SearchConfig),
        (["--config=search_v5e_8", "--what=verifier"], SearchConfig),
    ],
)
def test_the_recipe_says_what_is_compiled(words, kind):
    taken = []
    found = [*words, "--topology", "v5e:4x4"]

    cli.run_command(command_for(found, lambda *configs: taken.extend(configs)), found)
    assert isinstance(taken[1], kind)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "corrector_v5e16", "--topology", "v5e:4x4"], "did you mean corrector_v5e_16"),
        (["--config", "corrector_v5e_16", "--topology", "v5e"], "topology is 'v5e'"),
        (["--config", "corrector_v5e_16", "--topology", "v5e:4x4", "--blocks", "2"], "blocks is '2'"),
        (["--config", "corrector_v5e_16", "--topology", "v5e:4x4", "--slices", "0"], "slices is 0"),
        (["--config", "corrector_v5e_16", "--topology", "v5e:4x4", "--what", "sample"], "this is a training recipe"),
        (["--config", "search_v5e_8", "--topology", "v5e:2x4", "--what", "train"], "this is a search's recipe"),
        (["--config", "corrector_v5e_16", "--topology", "v5e:4x4", "--mesh.fsp", "2"], "did you mean mesh.fsdp"),
    ],
)
def test_mistakes_are_one_line(words, message):
    with pytest.raises(InputError, match=re.escape(message)):
        main(["compile", *words])


def test_bytes_are_those_of_one_device():
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = [jax.ShapeDtypeStruct((8, 2), jnp.bfloat16, sharding=place) for place in (cut, whole)]
    assert bytes_on_a_device(shapes) == 8 + 32


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_in_the_table_and_fits(recipe):
    rows = [line for line in (ROOT / "docs" / "scaling.md").read_text().splitlines() if f"`{recipe}`" in line]
    assert rows, f"docs/scaling.md: no row for {recipe}"
    assert not [row for row in rows if "does not fit" in row]
