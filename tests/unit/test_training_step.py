"""The training step over meshes, in parts and with less memory: the same numbers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rflow_jax.errors import InputError
from rflow_jax.parallel.mesh import MeshConfig, make_mesh, put_batch
from rflow_jax.training.checkpoints import CheckpointConfig, Checkpoints
from rflow_jax.training.model import TrainableConfig, load_trained
from rflow_jax.training.optimizers import OptimizerConfig, make_optimizer
from rflow_jax.training.step import Inputs, Recipe, Shape, init_state, make_encode, make_step

GOLDEN = Path(__file__).parents[1] / "golden"
BATCH, TEXT, STEPS = 8, 16, 2


def batch(step: int) -> Inputs:
    rng = np.random.default_rng(step)
    first = step * BATCH
    return Inputs(
        rng.integers(0, 256, (BATCH, 32, 32, 3), np.uint8),
        rng.integers(0, 256, (BATCH, 16, 16, 3), np.uint8),
        rng.integers(0, 50, (BATCH, 77)).astype(np.int32),
        rng.integers(0, 50, (BATCH, TEXT)).astype(np.int32),
        np.arange(first, first + BATCH, dtype=np.uint32),
    )


class Run:
    """A few steps of training on a tiny model."""

    def __init__(self, mesh: MeshConfig, devices: int, trainable: TrainableConfig | None = None, **how):
        self.mesh = make_mesh(mesh, jax.devices()[:devices])
        self.trained = load_trained(
            str(GOLDEN / "pipeline"), trainable or TrainableConfig(rank=4), seed=0, dtype="float32", mesh=self.mesh
        )
        optimizer = make_optimizer(OptimizerConfig("adamw", lr=1e-2))
        recipe = Recipe(0, jnp.float32, Shape(TEXT, (2, 2), (1, 1)), **how)
        self.state, shardings = init_state(self.trained.trainable, optimizer, self.mesh)
        self._encode = make_encode(self.trained.bundle, recipe, self.mesh)
        config = self.trained.bundle.flux_config
        self._step = make_step(self.trained.graph, config, optimizer, recipe, self.mesh, shardings)

    def losses(self, steps: range = range(STEPS)) -> np.ndarray:
        """[steps, 2]: losses and norms of the gradients."""
        weights, found = self.trained.bundle.weights, []
        encoders = {name: weights[name] for name in ("vae", "clip", "t5")}
        for step in steps:
            inputs = put_batch(self.mesh, batch(step))
            examples = self._encode(encoders, inputs)
            with jax.transfer_guard("disallow"):
                self.state, report = self._step(self.state, self.trained.frozen, examples, inputs.numbers)
            found.append(jax.device_get(tuple(report)))
        return np.asarray(found)


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    return Run(MeshConfig(), 1, remat="none").losses()


@pytest.mark.parametrize(
    ("mesh", "devices", "how"),
    [
        (MeshConfig(), 1, {"remat": "dots", "accumulation": 4}),
        (MeshConfig(data=1, fsdp=4), 4, {"remat": "full", "accumulation": 2}),
        (MeshConfig(data=2, fsdp=2, tensor=2), 8, {"remat": "full"}),
    ],
    ids=["in parts", "fsdp in parts", "data x fsdp x tensor"],
)
def test_losses_and_gradients_are_those_of_one_device(plain, mesh, devices, how):
    np.testing.assert_allclose(Run(mesh, devices, **how).losses(), plain, rtol=1e-5)


def test_training_moves_the_loras_second_matrix_first(plain):
    run = Run(MeshConfig(), 1)
    before = jax.device_get(run.state.trainable)
    run.losses(range(1))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, jax.device_get(run.state.trainable))
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_a_full_fine_tune_moves_what_the_pattern_names():
    run = Run(MeshConfig(), 1, TrainableConfig(parameters=r"single_blocks\.0\..*"))
    assert {str(path[0]) for path, _ in jax.tree_util.tree_flatten_with_path(run.state.trainable)[0]}
    assert np.isfinite(run.losses(range(1))).all()


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(InputError, match="matches no parameter"):
        Run(MeshConfig(), 1, TrainableConfig(parameters="nothing"))


def test_a_checkpoint_goes_on_where_the_run_stopped(tmp_path):
    whole = Run(MeshConfig(), 1).losses(range(3))
    first = Run(MeshConfig(), 1)
    first.losses(range(2))
    kept = Checkpoints(tmp_path, CheckpointConfig())
    kept.save(first.state, {"step": 2}, {"train.seed": 0}, first.trained)
    kept.wait()
    kept.close()
    second, again = Run(MeshConfig(), 1), Checkpoints(tmp_path, CheckpointConfig())
    restored = again.restore(second.state, {"train.seed": 0})
    assert restored is not None
    second.state, position = restored
    assert position == {"step": 2}
    np.testing.assert_array_equal(second.losses(range(2, 3)), whole[2:])
    assert (tmp_path / "lora" / "2" / "pytorch_lora_weights.safetensors").exists()
    with pytest.raises(InputError, match=r"train\.seed"):
        again.restore(second.state, {"train.seed": 1})
    again.close()


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
