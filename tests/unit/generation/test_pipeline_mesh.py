"""Pictures made on meshes of eight fake devices are those of one."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from PIL import Image

from rflow_jax import load_pipeline
from rflow_jax.commands.generate import GenerateConfig, generate
from rflow_jax.errors import InputError
from rflow_jax.generation.config import SamplingConfig
from rflow_jax.parallel.layout import MeshConfig
from rflow_jax.parallel.mesh import make_mesh, mesh_of_first

SETTINGS = SamplingConfig(
    height=64, width=32, num_inference_steps=2, condition_size=32, max_sequence_length=16, batch_size=4
)


@pytest.fixture(scope="module")
def make(golden):
    bad = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))

    def make(mesh: MeshConfig | None = None, **how) -> np.ndarray:
        spread = None if mesh is None else make_mesh(mesh, jax.devices()[:8])
        lora = str(golden / "lora")
        pipe = load_pipeline(str(golden / "pipeline"), lora=lora, dtype="float32", mesh=spread, progress=False, **how)
        images = pipe.generate(["a cat"] * 4, seeds=range(4), conditions=[bad] * 4, settings=SETTINGS)
        return np.stack([np.asarray(image, np.int32) for image in images])

    return make


@pytest.fixture(scope="module")
def alone(make):
    return make()


@pytest.mark.parametrize(
    ("mesh", "how"),
    [
        (MeshConfig(data=2, fsdp=2, tensor=2), {"scan_blocks": True}),
        (MeshConfig(data=2, sequence=4), {"attention": "flash"}),
        (MeshConfig(data=1, sequence=2, tensor=4), {"scan_blocks": True}),
    ],
    ids=["stacked, data x fsdp x tensor", "data x sequence, kernel", "stacked, sequence x tensor"],
)
def test_pictures_are_those_of_one_device(make, alone, mesh, how):
    assert np.abs(make(mesh, **how) - alone).max() <= 1


def test_generate_takes_a_mesh(golden, tmp_path, capsys):
    config = GenerateConfig(
        model=str(golden / "pipeline"),
        prompt="a cat",
        out=str(tmp_path),
        dtype="float32",
        mesh=MeshConfig(data=1, fsdp=2, sequence=2),
        sampling=SamplingConfig(height=32, width=32, num_inference_steps=1, max_sequence_length=16),
    )
    assert generate(config) == 0
    assert json.loads((tmp_path / "seed_0.json").read_text())["seed"] == 0
    with pytest.raises(InputError, match="16 devices are asked for, and this process has 8"):
        mesh_of_first(MeshConfig(data=1, tensor=16))
