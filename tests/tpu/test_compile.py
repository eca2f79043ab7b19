"""Real programs compiled by the TPU's own compiler, on a CPU: what it refuses would fail on every TPU.

Skipped without libtpu (``pip install 'rflow_jax[tpu]'``), but where ``RFLOW_REQUIRE_TPU_COMPILER`` is set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

if os.environ.get("RFLOW_REQUIRE_TPU_COMPILER") != "1":
    pytest.importorskip("libtpu")


def compiled(folder, *words: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    file = folder / "result.json"
    command = [sys.executable, "-m", "rflow_jax.commands.main", "compile", "--json", str(file), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done, json.loads(file.read_text()) if file.exists() else {}


def test_training_step_of_a_recipe_on_sixteen_chips(tmp_path):
    """Forward and backward of two blocks of each kind, kernels in shards, parameters cut over all chips."""
    done, found = compiled(tmp_path, "--config", "corrector_v5e_16", "--topology", "v5e:4x4", "--blocks", "2,2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert found["fits"]
    assert 0 < found["bytes_per_chip"] < found["hbm_bytes"]
    assert found["chips"] == 16
    assert found["collectives"]["all-gather"]["count"] > 0
    step = next(one for one in found["programs"] if one["name"] == "step")
    assert step["collectives"]["pallas_calls"] >= 3  # a kernel forward, and two backward
    assert step["collectives"]["unknown_loops"] == 0
    # Nothing large is whole anywhere, the autoencoder aside.
    assert all(nbytes < 2**20 for path, nbytes in step["whole"] if not path.startswith("vae."))


def test_sampler_of_a_recipe_on_eight_chips(tmp_path):
    words = ["--config", "search_v6e_8", "--topology", "v6e:2x4", "--what", "sample", "--blocks", "2,2"]
    latency = ["--mesh.fsdp=1", "--mesh.sequence=4", "--mesh.tensor=2", "--sampling.batch_size=1"]
    done, found = compiled(tmp_path, *words, *latency)
    assert done.returncode == 0, done.stdout + done.stderr
    assert found["fits"]
    assert found["mesh"] == {"data": 1, "fsdp": 1, "sequence": 4, "tensor": 2}
    assert next(one for one in found["programs"] if one["name"] == "sample")["collectives"]["pallas_calls"] > 0
    assert "fits" in done.stdout
    assert "TPU times are unverified" in done.stdout
