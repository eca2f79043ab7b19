"""The training step over meshes, in parts and with less memory: the same numbers."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from rflow_jax.errors import InputError
from rflow_jax.parallel.mesh import MeshConfig, make_mesh, put_batch
from rflow_jax.training.checkpoints import Checkpoints
from rflow_jax.training.config import CheckpointConfig
from rflow_jax.training.corrector.step import ENCODERS, StepInputs
from tests.kit.training import TrainingRun, batch


@pytest.fixture(scope="module")
def single() -> TrainingRun:
    return TrainingRun(MeshConfig(), 1, remat="none")


@pytest.fixture(scope="module")
def plain(single) -> np.ndarray:
    """Losses and gradients of three steps."""
    return single.restart().losses(range(3))


@pytest.mark.parametrize(
    ("mesh", "devices", "how"),
    [
        (MeshConfig(), 1, {"remat": "dots", "gradient_accumulation_steps": 4}),
        (MeshConfig(data=1, fsdp=4), 4, {"remat": "full", "gradient_accumulation_steps": 2}),
        (MeshConfig(data=2, fsdp=2, tensor=2), 8, {"remat": "full"}),
        (MeshConfig(data=1, fsdp=2, sequence=2), 4, {"remat": "full", "scan_blocks": True}),
    ],
    ids=[
        "in parts",
        "fsdp in parts",
        "data x fsdp x tensor",
        "stacked, fsdp x sequence",
    ],
)
def test_losses_and_gradients_are_those_of_one_device(plain, mesh, devices, how):
    np.testing.assert_allclose(TrainingRun(mesh, devices, **how).losses(), plain[:2], rtol=1e-5)


def test_training_moves_the_loras_second_matrix_first(single):
    run = single.restart()
    before = jax.device_get(run.state.trainable)
    run.losses(range(1))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, jax.device_get(run.state.trainable))
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_a_step_closes_over_no_array_of_a_device(single):
    """Such an array is copied to the host when the program is made, which the loop forbids."""
    run = single.restart()
    inputs = StepInputs(*put_batch(run.mesh, batch(0)))
    encoders = {name: run.trained.bundle.weights[name] for name in ENCODERS}
    given = run.state, run.trained.frozen, run._encode(encoders, inputs), inputs.numbers
    for program in (run._encode.trace(encoders, inputs), run._step.trace(*given)):
        assert [type(one) for one in program.jaxpr.consts if isinstance(one, jax.Array)] == []


def test_a_full_fine_tune_moves_what_the_pattern_names():
    run = TrainingRun(MeshConfig(), 1, parameters=r"single_blocks\.0\..*")
    assert {str(path[0]) for path, _ in jax.tree_util.tree_flatten_with_path(run.state.trainable)[0]}
    assert np.isfinite(run.losses(range(1))).all()


def test_parameters_of_some_blocks_cannot_be_stacked():
    with pytest.raises(InputError, match="of some blocks only"):
        TrainingRun(MeshConfig(), 1, parameters=r"single_blocks\.0\..*", scan_blocks=True)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(InputError, match="matches no parameter"):
        TrainingRun(MeshConfig(), 1, parameters="nothing")


def test_a_checkpoint_goes_on_where_the_run_stopped(tmp_path, single, plain):
    first = single.restart()
    first.losses(range(2))
    kept = Checkpoints(tmp_path, CheckpointConfig())
    kept.save(first.state, {"step": 2}, {"train.seed": 0}, first.trained)
    kept.wait()
    kept.close()
    second, again = single.restart(), Checkpoints(tmp_path, CheckpointConfig())
    restored = again.restore(second.state, {"train.seed": 0})
    assert restored is not None
    second.state, position = restored
    assert position == {"step": 2}
    np.testing.assert_array_equal(second.losses(range(2, 3)), plain[2:])
    assert (tmp_path / "lora" / "2" / "pytorch_lora_weights.safetensors").exists()
    with pytest.raises(InputError, match=r"train\.seed"):
        again.restore(second.state, {"train.seed": 1})
    again.close()


def test_a_checkpoint_is_the_same_whether_blocks_are_stacked(tmp_path, single, plain):
    """Written by a run with stacked blocks cut over devices, it goes on with blocks in a list on one."""
    first = TrainingRun(MeshConfig(data=2, fsdp=2), 4, scan_blocks=True)
    first.losses(range(1))
    kept = Checkpoints(tmp_path, CheckpointConfig())
    kept.save(first.trained.to_saved(first.state), {}, {}, first.trained)
    kept.wait()
    second = single.restart()
    restored = kept.restore(second.state, {})
    kept.close()
    assert restored is not None
    again = jax.device_get(first.trained.to_running(restored[0]))
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(first.state))
    restored = Checkpoints(tmp_path, CheckpointConfig()).restore(second.state, {})
    assert restored is not None
    second.state = restored[0]
    np.testing.assert_allclose(second.losses(range(1, 2)), plain[1:2], rtol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "match"),
    [
        (MeshConfig(data=3), "does not divide"),
        (MeshConfig(tensor=16), "does not divide"),
    ],
)
def test_a_mesh_that_does_not_divide_the_devices_is_refused(mesh, match):
    with pytest.raises(InputError, match=match):
        make_mesh(mesh, jax.devices()[:8])


def test_only_one_axis_takes_the_rest():
    with pytest.raises(InputError, match="only one axis"):
        MeshConfig(data=-1, fsdp=-1)
