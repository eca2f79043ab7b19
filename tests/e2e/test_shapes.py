"""The models that come with the package, as a user has them, judged exactly."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from rflow_jax.errors import InputError
from rflow_jax.weights import hub
from rflow_jax.weights.packed import unpacked
from tests.kit.processes import run

MODELS = Path(hub.__file__).parents[1] / "shapes" / "models"
PROMPTS, IMAGES = 24, 8


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, np.ndarray]:
    """What the verifier and the exact judge say of a search by reflection on held-out prompts, in CI's small form."""
    out = tmp_path_factory.mktemp("scaling") / "out"
    small = ["--prompts", PROMPTS, "--images", IMAGES, "--seeds", "[0]", "--arms", "[reflection]"]
    quick = ["--dtype", "float32", "--num_inference_steps", 12, "--batch_size", 16]
    # Fast code for one device, which the flags of the tests are not made for.
    done = run(["infer.py", "shapes", "scaling", out, *small, *quick], {"XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr
    with np.load(out / "reflection_0.npz") as found:
        return dict(found)


def test_corrections_make_pictures_right(results):
    """With room for other processors' rounding; the figures of the whole are in docs/shapes.md."""
    right = results["right"]
    assert right.shape == (PROMPTS, IMAGES)
    assert right[:, :2].mean() > 0.5  # from noise
    assert right[:, -2:].mean() > right[:, :2].mean() + 0.05  # corrected three times


def test_the_verifier_errs_but_finds(results):
    right, kept = results["right"], results["kept"]
    assert right[kept].mean() > 0.8
    assert 0.05 < (right != kept).mean() < 0.4


def test_a_damaged_file_is_noticed(tmp_path):
    folder = shutil.copytree(MODELS / "shapes-corrector", tmp_path / "copy")
    file = folder / "pytorch_lora_weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="missing or damaged: its sum is not the recorded one"):
        unpacked(folder)


def test_they_fit_into_the_wheel():
    assert sum(file.stat().st_size for file in MODELS.rglob("*") if file.is_file()) < 16 * 2**20
