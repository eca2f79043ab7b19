"""The losses of reward training against PyTorch's, and their gradients."""

# ruff: noqa: E402 (what needs the parity extra is imported after the check for it)

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the parity extra is not installed")

from torch.nn.functional import logsigmoid

from rflow_jax.data.sources.preferences import INVALID, TIE, A, B
from rflow_jax.training.reward.loss import pair_accuracy, pair_losses

LOSSES = ("bt", "margin", "constant_margin", "scaled", "reg", "btt")
TOLERANCE = 1e-6


def theirs(name: str, rewards: torch.Tensor, scores: torch.Tensor, labels: list[int]) -> torch.Tensor:
    """Pair by pair, as REFERENCE has the formulas; the mean of all entries."""
    log_k, entries = float(np.log(5)), []
    for (a, b), (score_a, score_b), label in zip(rewards, scores, labels, strict=True):
        chosen, rejected, s_c, s_r = (a, b, score_a, score_b) if label == A else (b, a, score_b, score_a)
        zero = 0 * a
        if name == "reg":
            entries += [(a - (score_a - 3)) ** 2 if score_a else zero, (b - (score_b - 3)) ** 2 if score_b else zero]
        elif name == "btt":
            better = -logsigmoid(chosen - rejected - log_k)
            tie = better - logsigmoid(rejected - chosen - log_k) - float(np.log(24))
            entries.append({A: better, B: better, TIE: tie}.get(label, zero))
        elif label not in (A, B):
            entries.append(zero)
        elif name == "bt":
            entries.append(-logsigmoid(chosen - rejected))
        elif name == "margin":
            entries.append(-logsigmoid(chosen - rejected - (s_c - s_r)))
        elif name == "constant_margin":
            entries.append(-logsigmoid(chosen - rejected - 0.57))
        else:
            entries.append(-(s_c - s_r) * logsigmoid(chosen - rejected))
    return torch.stack(entries).mean()


def compare(name: str, rewards: np.ndarray, scores: np.ndarray, labels: list[int]) -> None:
    def loss(x):
        return jnp.mean(pair_losses(name, x, jnp.asarray(scores), jnp.asarray(labels, jnp.int32)))

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(rewards))
    given = torch.tensor(rewards, requires_grad=True)
    want = theirs(name, given, torch.tensor(scores), labels)
    want.backward()
    size = max(1.0, abs(want.item()))
    assert abs(float(value) - want.item()) <= TOLERANCE * size
    np.testing.assert_allclose(gradient, given.grad.numpy(), rtol=TOLERANCE, atol=TOLERANCE)


number = st.floats(-8, 8, width=32)
pair = st.tuples(number, number, st.sampled_from([0.0, 1.0, 2.0, 3.5, 5.0]), st.sampled_from([0.0, 1.0, 4.0]))


@pytest.mark.parametrize("name", LOSSES)
@given(pairs=st.lists(st.tuples(pair, st.sampled_from([A, B, TIE, INVALID])), min_size=4, max_size=4))
def test_losses_and_gradients_are_those_of_pytorch(name, pairs):
    values = np.asarray([value for value, _ in pairs], np.float32)
    compare(name, values[:, :2], values[:, 2:], [label for _, label in pairs])


@pytest.mark.parametrize("name", LOSSES)
def test_far_apart_they_stay_numbers(name):
    rewards = np.asarray([[1e4, -1e4], [-1e4, 1e4], [300, -300], [0, 0]], np.float32)
    compare(name, rewards, np.asarray([[1, 5], [5, 1], [0, 2], [0, 0]], np.float32), [A, A, TIE, B])


@pytest.mark.parametrize("name", LOSSES)
def test_pairs_without_a_label_have_no_gradient(name):
    def loss(x):
        return jnp.mean(pair_losses(name, x, jnp.zeros((3, 2)), jnp.full(3, INVALID, jnp.int32)))

    value, gradient = jax.value_and_grad(loss)(jnp.asarray([[1.0, 2], [3, 4], [-5, 6]]))
    assert float(value) == 0
    assert not np.asarray(gradient).any()


def test_a_bfloat16_reward_is_taken_in_float32():
    rewards = jnp.asarray([[1.0, 0.5]], jnp.bfloat16)
    assert pair_losses("bt", rewards, jnp.zeros((1, 2)), jnp.asarray([A])).dtype == jnp.float32


def test_accuracy_is_over_pairs_with_a_preference():
    rewards = jnp.asarray([[1.0, 0], [1, 0], [0, 1], [1, 0], [1, 0], [1, 1]])
    right, counted = pair_accuracy(rewards, jnp.asarray([A, B, B, TIE, INVALID, A]))
    assert (float(right), float(counted)) == (2, 4)
