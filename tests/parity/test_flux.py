"""The transformer without a condition against diffusers' own forward pass."""

# ruff: noqa: E402 (what needs the parity extra is imported after the check for it)

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
diffusers = pytest.importorskip("diffusers", reason="the parity extra is not installed")

from diffusers.models.embeddings import get_timestep_embedding

from rflow_jax.flow import image_ids, rope_for, text_ids
from rflow_jax.models.flux.layers import TIME_FEATURES, TIME_SCALE, time_features, time_frequencies
from rflow_jax.models.flux.transformer import FluxTransformer
from rflow_jax.weights.components import TRANSFORMER
from rflow_jax.weights.loading import load_into
from rflow_jax.weights.safetensors_io import TensorFiles
from tests.kit.compare import relative_error
from tests.kit.torch_models import randomise

pytestmark = pytest.mark.parity
TOLERANCE = 2e-5
TEXT, GRID, BATCH = 7, (2, 5), 2

CONFIGS = {
    "dev": {
        "num_layers": 2,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "axes_dims_rope": (4, 4, 16),
        "joint_attention_dim": 36,
        "pooled_projection_dim": 10,
        "guidance_embeds": True,
    },
    "schnell": {
        "num_layers": 1,
        "num_single_layers": 3,
        "num_attention_heads": 5,
        "attention_head_dim": 8,
        "axes_dims_rope": (2, 2, 4),
        "joint_attention_dim": 20,
        "pooled_projection_dim": 14,
        "in_channels": 16,
        "guidance_embeds": False,
    },
}


@pytest.fixture(scope="module", params=CONFIGS)
def reference(request):
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(**CONFIGS[request.param])
    randomise(model, 1)
    return model


def load(root: Path) -> FluxTransformer:
    config = TRANSFORMER.read_config(root)
    files = TensorFiles.open(root / TRANSFORMER.folder)
    return load_into(TRANSFORMER.abstract(config), TRANSFORMER.table_for(files, config), files)


def inputs(config) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = {
        "hidden_states": (BATCH, GRID[0] * GRID[1], config.in_channels),
        "encoder_hidden_states": (BATCH, TEXT, config.joint_attention_dim),
        "pooled_projections": (BATCH, config.pooled_projection_dim),
    }
    arrays = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["timestep"] = np.asarray([0.9, 0.1], np.float32)
    return arrays | ({"guidance": np.asarray([3.5, 1.25], np.float32)} if config.guidance_embeds else {})


def theirs(model, arrays: dict[str, np.ndarray]) -> np.ndarray:
    places = {"img_ids": image_ids(*GRID), "txt_ids": text_ids(TEXT)}
    with torch.no_grad():
        return model(**{key: torch.from_numpy(a) for key, a in (arrays | places).items()}).sample.numpy()


def ours(model: FluxTransformer, arrays: dict[str, np.ndarray]) -> jax.Array:
    rope = rope_for(model.config, TEXT, GRID)
    guidance = jnp.asarray(arrays["guidance"]) if model.config.guidance_embeds else None
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    run = nnx.jit(lambda model, args: model(*args, rope=rope, guidance=guidance))
    with jax.default_matmul_precision("highest"):
        return run(model, [jnp.asarray(arrays[name]) for name in names])


def test_forward_of_one_file_and_of_shards(reference, tmp_path):
    arrays = inputs(reference.config)
    want = theirs(reference, arrays)
    reference.save_pretrained(tmp_path / "whole" / "transformer")
    reference.save_pretrained(tmp_path / "shards" / "transformer", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").rglob("*.safetensors"))) > 2
    for name in ("whole", "shards"):
        assert relative_error(ours(load(tmp_path / name), arrays), want) < TOLERANCE


@pytest.mark.parametrize("value", [0.0, 0.37, 1.0, 3.5, 7.3, 10.0])
def test_time_features_to_the_last_bit_of_their_frequencies(value):
    times = torch.tensor([value], dtype=torch.float32) * TIME_SCALE
    want = get_timestep_embedding(times, TIME_FEATURES, flip_sin_to_cos=True, downscale_freq_shift=0).numpy()
    frequencies = time_frequencies()
    # The last bit of a frequency and the rounding of the angle move the angle; cosine and sine follow by at most that.
    angles = frequencies * np.float32(value * TIME_SCALE)
    last_bit = np.tile(np.spacing(frequencies) * value * TIME_SCALE + np.spacing(angles), 2)
    error = np.abs(np.asarray(time_features(jnp.asarray([value], jnp.float32))) - want)
    assert (error <= last_bit + 1e-6).all()
    assert np.mean(error <= 1e-6) > 0.9  # and nearly all frequencies have every bit
