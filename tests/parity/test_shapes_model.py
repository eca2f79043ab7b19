"""The new model of the shapes world in diffusers, which draws the same picture with it."""

# ruff: noqa: E402 (what needs the parity extra is imported after the check for it)

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
diffusers = pytest.importorskip("diffusers", reason="the parity extra is not installed")

import jax.numpy as jnp
from PIL import Image

from rflow_jax.generation.config import SamplingConfig
from rflow_jax.generation.pipeline import Request, load_pipeline
from rflow_jax.generation.sampling import noise_draws
from rflow_jax.parallel.runtime import reproducible
from rflow_jax.shapes.model import DEFAULTS, new_network, save_pipeline, sizes, write_start
from rflow_jax.weights.components import TRANSFORMER, VAE
from rflow_jax.weights.loading import parameter_variables

pytestmark = pytest.mark.parity
PROMPT, REFLECTION = "a photo of a red star left of a blue ring", "Move the Red star left of the blue ring."
STEPS = 4
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A new model, with numbers in place of the zeros of its transformer: otherwise its velocity is 0."""
    root = tmp_path_factory.mktemp("shapes")
    write_start(root / "start")
    transformer, vae = (new_network(one, sizes()[one.folder], seed=1) for one in (TRANSFORMER, VAE))
    rng = np.random.default_rng(0)
    for variable in parameter_variables(transformer).values():
        if not np.any(value := np.asarray(variable[...])):
            variable.set_value(jnp.asarray(0.05 * rng.standard_normal(value.shape, np.float32)))
    networks = {TRANSFORMER.folder: transformer, VAE.folder: vae}
    change = {VAE.folder: {"scaling_factor": 1.3, "shift_factor": 0.2}}
    save_pipeline(root / "model", networks, base=root / "start", changes=change)
    return root / "model"


def test_the_new_model_is_loaded_as_it_is_meant(tmp_path, caplog, monkeypatch):
    """Nothing in its files is unknown to diffusers, or missing."""
    write_start(tmp_path / "start")
    for name in ("diffusers", "transformers"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    with caplog.at_level(logging.WARNING):
        pipe = diffusers.FluxPipeline.from_pretrained(tmp_path / "start", local_files_only=True)
    said = [record.getMessage() for record in caplog.records]
    assert [text for text in said if "Flax classes are deprecated" not in text] == []
    assert pipe.vae_scale_factor == 8
    assert pipe.tokenizer_max_length == sizes()["text_encoder"].max_position_embeddings
    assert not pipe.transformer.config.guidance_embeds
    assert float(torch.abs(pipe.transformer.proj_out.weight).max()) == 0


def test_diffusers_draws_the_same_picture(folder):
    ours = load_pipeline(str(folder), dtype="float32", progress=False)
    settings = ours.resolve(SamplingConfig(num_inference_steps=STEPS))
    program = ours.program_of(settings, with_condition=False)
    request = Request(PROMPT, 3, reflection=REFLECTION)
    with reproducible("float32"):
        noise = ours._draw(program, (12, 12, 16), noise_draws([request.seed]))
        latents = torch.from_numpy(np.array(noise))
        given = ours.prepare(program, ours.bundle.weights, ours._inputs([request], settings))
        tokens, pixels, _ = ours.sample(program, ours.bundle.weights, noise, given, ours._scales(settings))

    theirs = diffusers.FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    how = {name: DEFAULTS[name] for name in ("height", "width", "guidance_scale", "max_sequence_length")}
    how |= {"prompt": PROMPT, "prompt_2": request.t5_text, "num_inference_steps": STEPS}
    expected = theirs(**how, latents=latents, output_type="latent").images
    assert float(torch.abs(expected - latents).max()) > 0.1
    np.testing.assert_allclose(tokens, expected.numpy(), atol=TOLERANCE)
    picture: Image.Image = theirs(**how, latents=latents).images[0]
    np.testing.assert_allclose(np.asarray(pixels[0], int), np.asarray(picture, int), atol=1)
