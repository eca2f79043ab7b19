"""The objective and the optimizers; their numbers are held against recordings by ``rflow parity``."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rflow_jax.errors import InputError
from rflow_jax.training.config import OptimizerConfig
from rflow_jax.training.corrector.loss import noisy
from rflow_jax.training.optimizers import make_optimizer, prodigy_numbers


def _minimise(config: OptimizerConfig, steps: int):
    """Steps on |p - 3|^2 from p = 0; returns p and the optimizer's state."""
    optimizer = make_optimizer(config)
    params = {"p": jnp.zeros(4)}

    @jax.jit
    def step(params, state):
        gradient = jax.grad(lambda q: jnp.sum(jnp.square(q["p"] - 3)))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return np.asarray(params["p"]), state


def test_the_path_runs_from_the_picture_to_the_noise():
    x_0, x_1 = jax.random.normal(jax.random.key(0), (2, 3, 2, 4))
    np.testing.assert_array_equal(noisy(x_0, x_1, jnp.zeros(3)), x_0)
    np.testing.assert_array_equal(noisy(x_0, x_1, jnp.ones(3)), x_1)
    np.testing.assert_allclose(noisy(x_0, x_1, jnp.asarray([0, 0.5, 1]))[1], (x_0[1] + x_1[1]) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig("prodigy", weight_decay=0.0),
        OptimizerConfig("adamw", lr=0.1, weight_decay=0.0),
        OptimizerConfig("sgd", lr=0.1, max_grad_norm=100.0, weight_decay=0.0),
    ],
    ids=lambda config: config.name,
)
def test_every_optimizer_reaches_the_minimum(config):
    p, _ = _minimise(config, 400)
    np.testing.assert_allclose(p, 3, atol=0.1)


def test_prodigy_finds_a_step_size():
    _, state = _minimise(OptimizerConfig("prodigy"), 100)
    numbers = prodigy_numbers(state)
    assert numbers is not None
    assert numbers.d > 1000 * OptimizerConfig().d0
    assert prodigy_numbers(_minimise(OptimizerConfig("adamw"), 1)[1]) is None


def test_the_decay_is_decoupled_from_the_gradient():
    decayed, _ = _minimise(OptimizerConfig("sgd", lr=0.1, max_grad_norm=100.0, weight_decay=0.5), 200)
    # The minimum of |p - 3|^2 + 0.25 |p|^2.
    np.testing.assert_allclose(decayed, 2.4, atol=1e-3)


def test_the_clip_bounds_the_global_norm():
    p, _ = _minimise(OptimizerConfig("sgd", lr=1.0, max_grad_norm=0.5, weight_decay=0.0), 1)
    assert np.linalg.norm(p) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": 0.0},
        {"lr": math.inf},
        {"max_grad_norm": -1.0},
        {"eps": math.nan},
        {"d0": math.nan},
        {"d_coef": math.inf},
        {"betas": (0.9, 1.0)},
        {"betas": (math.nan, 0.9)},
        {"betas": (-0.1, 0.9)},
        {"weight_decay": -0.1},
        {"weight_decay": math.nan},
        {"warmup_steps": -1},
        {"decay_steps": 10},
        {"decay_steps": 0, "schedule": "linear"},
    ],
    ids=str,
)
def test_numbers_that_make_no_sense(bad):
    with pytest.raises(InputError, match=f"^optimizer.{next(iter(bad))}"):
        OptimizerConfig(**bad)


def as_a_network(params):
    """The parameters as those of a network."""
    return nnx.State(jax.tree.map(nnx.Param, params))


@pytest.mark.parametrize("kind", [dict, as_a_network])
def test_muon_moves_the_matrices_of_blocks_and_adam_all_else(kind):
    config = OptimizerConfig("muon", lr=0.1, adam_lr=0.01, weight_decay=0.0, max_grad_norm=1e6)
    optimizer = make_optimizer(config)
    gradient = jax.random.normal(jax.random.key(0), (8, 4))
    params = {
        "blocks": {"0": {name: {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4)} for name in ("q", "mod")}},
        "head": {"kernel": jnp.zeros((8, 4))},
    }
    gradients = jax.tree.map(lambda p: gradient if p.ndim == 2 else gradient[0], params)
    given = kind(params)
    updates, _ = optimizer.update(kind(gradients), optimizer.init(given), given)
    updates = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(updates))
    block = updates["blocks"]["0"]
    # Orthogonal: all singular values are near one size, which gives entries the size of AdamW's steps.
    values = np.linalg.svd(np.asarray(block["q"]["kernel"]), compute_uv=False) / (0.1 * 0.2 * 8**0.5)
    assert values.min() > 0.6
    assert values.max() < 1.3
    adam = optax.nadam(0.01)
    wanted, _ = adam.update(gradients, adam.init(params), params)
    del block["q"]["kernel"], wanted["blocks"]["0"]["q"]["kernel"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), updates, wanted)


def test_muon_without_a_matrix():
    optimizer = make_optimizer(OptimizerConfig("muon", muon_parameters="layers.*"))
    with pytest.raises(InputError, match=r"optimizer.muon_parameters is 'layers\.\*': no matrix is called so"):
        optimizer.init(as_a_network({"blocks": {"kernel": jnp.zeros((2, 2))}}))
