"""The transformer's tables against diffusers: its single-file converter, and its modules on the meta device."""

# ruff: noqa: E402 (what needs the parity extra is imported after the check for it)

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
pytest.importorskip("diffusers", reason="the parity extra is not installed")

from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.flux.transformer import abstract_flux
from rflow_jax.weights.key_mapping import MappingPlan, plan
from rflow_jax.weights.loading import parameter_shapes
from rflow_jax.weights.mappings.flux import BFL, DIFFUSERS, bfl_config
from tests.kit.torch_models import on_meta, shapes_of

pytestmark = pytest.mark.parity
NARROW = 2  # columns of the kernels that stand for FLUX.1's: the fused tensors are split along rows alone


@pytest.mark.parametrize("guidance", [True, False])
def test_the_table_is_a_bijection_at_the_real_size(guidance):
    ours = parameter_shapes(abstract_flux(FluxConfig(guidance_embeds=guidance)))
    theirs = shapes_of(on_meta(FluxTransformer2DModel, guidance_embeds=guidance))
    the_plan = plan(DIFFUSERS, ours)
    the_plan.check(theirs, "meta")
    assert {key: the_plan.their_shape(key) for key in the_plan.entries} == theirs
    targets = [target.path for entry in the_plan.entries.values() for target in entry]
    assert sorted(targets) == sorted(ours)


@pytest.mark.parametrize("guidance", [True, False])
def test_single_files_read_as_diffusers_reads_them(guidance):
    """Every number of a file at FLUX.1's widths, which diffusers' converter has built in."""
    config = FluxConfig(num_layers=2, num_single_layers=2, guidance_embeds=guidance)
    shapes = {
        path: (NARROW, shape[1]) if path.endswith(".kernel") else shape
        for path, shape in parameter_shapes(abstract_flux(config)).items()
    }
    single, folder = plan(BFL, shapes), plan(DIFFUSERS, shapes)
    draw = np.random.default_rng(0)
    file = {key: draw.standard_normal(single.their_shape(key), dtype=np.float32) for key in single.entries}
    state = convert_flux_transformer_checkpoint_to_diffusers({k: torch.from_numpy(v) for k, v in file.items()})
    state = {key: value.numpy() for key, value in state.items()}
    folder.check({key: value.shape for key, value in state.items()}, "diffusers")
    ours, theirs = read(single, file), read(folder, state)
    assert ours.keys() == theirs.keys() == shapes.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)
    for key, value in file.items():
        np.testing.assert_array_equal(single.join(key, ours), value, err_msg=key)


def test_sizes_are_read_from_the_shapes():
    for config in (FluxConfig(), FluxConfig(guidance_embeds=False, num_layers=3)):
        the_plan = plan(BFL, parameter_shapes(abstract_flux(config)))
        assert bfl_config({key: the_plan.their_shape(key) for key in the_plan.entries}, "file") == config


def read(the_plan: MappingPlan, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        target.path: target.to_ours(rows)
        for key, tensor in tensors.items()
        for target, rows in the_plan.split(key, tensor)
    }
