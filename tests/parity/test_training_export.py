"""A LoRA that was trained here, saved, gone on with and exported, is the same adapter in diffusers."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="the parity extra is not installed")
pytest.importorskip("diffusers", reason="the parity extra is not installed")
pytest.importorskip("peft", reason="the parity extra is not installed")

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from rflow_jax.flow import image_ids, rope_for, text_ids
from rflow_jax.models.flux.config import ConditionFlags
from rflow_jax.parallel.mesh import MeshConfig
from rflow_jax.training.checkpoints import Checkpoints
from rflow_jax.training.config import CheckpointConfig, LoraConfig
from tests.kit.training import GOLDEN, TrainingRun

pytestmark = pytest.mark.parity
GRID = 2, 3


def inputs(run: TrainingRun) -> tuple[np.ndarray, ...]:
    draw, config = np.random.default_rng(0), run.trained.bundle.flux_config
    shapes = (2, GRID[0] * GRID[1], config.in_channels), (2, 5, config.joint_attention_dim)
    arrays = [draw.standard_normal(shape).astype(np.float32) for shape in (*shapes, (2, config.pooled_projection_dim))]
    return *arrays, np.asarray([0.3, 0.8], np.float32), np.asarray([3.5, 1.0], np.float32)


def our_output(run: TrainingRun) -> np.ndarray:
    model = run.trained.graph.merge(run.state.trainable, run.trained.frozen)
    latents, text, pooled, t, guidance = map(jnp.asarray, inputs(run))
    rope, flags = rope_for(model.config, text.shape[1], GRID), ConditionFlags(latent_lora=True)
    return np.asarray(model(latents, text, pooled, t, rope=rope, guidance=guidance, flags=flags))


def their_output(model: FluxTransformer2DModel, run: TrainingRun) -> np.ndarray:
    latents, text, pooled, t, guidance = map(torch.from_numpy, inputs(run))
    with torch.no_grad():
        return model(
            hidden_states=latents,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=t,
            img_ids=torch.from_numpy(image_ids(*GRID)),
            txt_ids=torch.from_numpy(text_ids(text.shape[1])),
            guidance=guidance,
        ).sample.numpy()


def test_trained_resumed_and_exported_it_loads_in_diffusers(tmp_path: Path):
    lora = LoraConfig(rank=4, alpha=2.0)
    first = TrainingRun(MeshConfig(), 1, lora, remat="none")
    first.losses(range(2))
    kept = Checkpoints(tmp_path, CheckpointConfig())
    kept.save(first.state, {}, {}, first.trained)
    kept.wait()
    kept.close()

    run, again = TrainingRun(MeshConfig(), 1, lora, remat="none"), Checkpoints(tmp_path, CheckpointConfig())
    restored = again.restore(run.state, {})
    assert restored is not None
    run.state = restored[0]
    run.losses(range(2, 4))
    again.save(run.state, {}, {}, run.trained)
    again.wait()
    again.close()

    model = FluxTransformer2DModel.from_pretrained(GOLDEN / "pipeline" / "transformer")
    plain = their_output(model, run)
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, model)
    pipe.load_lora_weights(str(tmp_path / "lora" / "4"), weight_name="pytorch_lora_weights.safetensors")
    want = their_output(model, run)
    assert abs(want - plain).max() > 1e-3, "the LoRA does nothing"
    np.testing.assert_allclose(our_output(run), want, atol=1e-4, rtol=1e-4)
