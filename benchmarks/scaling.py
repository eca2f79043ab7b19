"""What every recipe takes of a TPU chip, compiled for its topology on this machine's CPU.

    python -m benchmarks.scaling [--only SUBSTRING] [--out results.json] [--markdown docs/scaling_table.md]

Each row is one call of ``rflow compile``; the table has the compiler's memory, what chips send each
other in a step, and the least time by published rates. Rows that fill more than 85 % of a chip are compiled again with
the compiler's default effort, whose program is the one that runs. About an hour on two cores. Nothing runs on a TPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FULL = 0.85  # of a chip's memory
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One recipe on one topology."""

    recipe: str
    topology: str
    what: str = "train"
    slices: int = 1
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        slices = f" x {self.slices}" if self.slices > 1 else ""
        return " ".join([self.recipe, self.what, f"{self.topology}{slices}", *self.overrides])


TRAINING = (
    Row("corrector_v5e_16", "v5e:4x4"),
    Row("corrector_v5e_64", "v5e:8x8"),
    Row("corrector_v5e_2x16", "v5e:4x4", slices=2),
    Row("corrector_v5p_4", "v5p:2x2x1"),
    Row("corrector_v5p_pod", "v5p:2x4x4"),
    Row("corrector_v6e_8", "v6e:2x4"),
    Row("corrector_v6e_64", "v6e:8x8"),
    Row("corrector_v6e_256", "v6e:16x16"),
)
ONE_V5P = ("--mesh.fsdp=1",)
SAMPLING = (
    Row("search_v5e_8", "v5e:2x4", "sample"),
    Row("search_v6e_8", "v6e:2x4", "sample"),
    Row(
        "search_v6e_8",
        "v6e:2x4",
        "sample",
        overrides=("--mesh.fsdp=1", "--mesh.tensor=2", "--mesh.sequence=4", "--sampling.batch_size=1"),
    ),
    Row("flux_dev_nvila", "v5p:1x1x1", "sample"),
)
VERIFIERS = (
    Row("search_v5e_8", "v5e:1x1", "verifier"),
    Row("search_v5e_8", "v5e:2x4", "verifier"),
    Row("flux_dev_nvila", "v6e:1x1", "verifier"),
    Row("flux_dev_reward", "v5p:1x1x1", "verifier"),
)
# Recipes for GPUs, whose compiler needs a GPU: on one TPU chip of 95 GiB, against the 80 of a GPU.
ON_A_LARGE_CHIP = (
    Row("corrector_flux_dev", "v5p:1x1x1", overrides=("--train.batch_size=8",)),
    Row("corrector_one_gpu", "v5p:1x1x1"),
    Row("reward_qwen2_5_vl", "v5p:1x1x1"),
    Row("sft_qwen2_5_vl_7b", "v5p:1x1x1"),
    Row("flux_dev_gpt", "v5p:1x1x1", "sample"),
    Row("flux_dev_reward", "v5p:1x1x1", "sample"),
)
ROWS = TRAINING + SAMPLING + VERIFIERS + ON_A_LARGE_CHIP


def compiled(row: Row, effort: str = "least") -> dict[str, Any]:
    """The results of one row, as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        words = ["--config", row.recipe, "--topology", row.topology, "--what", row.what, "--slices", str(row.slices)]
        words += ["--effort", effort, "--json", str(file), *row.overrides]
        command = [sys.executable, "-m", "rflow_jax.commands.main", "compile", *words]
        run = subprocess.run(command, capture_output=True, text=True)
        if not file.exists():
            return {"row": row.name, "error": (run.stderr.strip().splitlines() or ["no result"])[-1]}
        return {"row": row.name, "recipe": row.recipe, "what": row.what, **json.loads(file.read_text())}


def markdown(results: list[dict[str, Any]]) -> str:
    """The table of docs/scaling.md."""
    lines = [
        "| recipe | what | topology | mesh | GiB a chip | of | sent a chip, GB | bound, s | effort | compile, CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        if "error" in one:
            lines.append(f"| {one['row']} | {one['error']} |")
            continue
        axes = ", ".join(f"{axis} {size}" for axis, size in one["mesh"].items() if size > 1) or "-"
        slices = f"{one['slices']} x " if one["slices"] > 1 else ""
        used = "more" if one["bytes_per_chip"] is None else f"{one['bytes_per_chip'] / GIB:.1f}"
        sent = sum(kind["ici_bytes"] + kind["dcn_bytes"] for kind in one["collectives"].values()) / 1e9
        bound = one["estimate"]["seconds"] if one["estimate"] else 0.0
        lines.append(
            f"| `{one['recipe']}` | {one['what']} | {slices}{one['topology']} | {axes} | "
            f"{used}{'' if one['fits'] else ' **does not fit**'} | {one['hbm_bytes'] / GIB:.1f} | {sent:.1f} | "
            f"{bound:.2f} | {one['effort']} | {one['compile_seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Compiles the rows; the exit status is 1 where one does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--out", default="runs/scaling.json", help="results as JSON; rows that are there stay")
    parser.add_argument("--markdown", default=None, help="a file for the table")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    known = {one["row"]: one for one in json.loads(out.read_text())} if out.exists() else {}
    for row in ROWS:
        if arguments.only not in row.name or (row.name in known and "error" not in known[row.name]):
            continue
        result = compiled(row)
        used, limit = result.get("bytes_per_chip"), result.get("hbm_bytes")
        if used and limit and FULL * limit < used:
            result = compiled(row, "default")
        known[row.name] = result
        out.write_text(json.dumps([known[one.name] for one in ROWS if one.name in known], indent=1))
        print(markdown([result]).splitlines()[-1], flush=True)
    results = [known[one.name] for one in ROWS if one.name in known]
    if arguments.markdown:
        Path(arguments.markdown).write_text(markdown(results))
    return 0 if all(one.get("fits") for one in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
