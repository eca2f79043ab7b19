"""Packing, positions, times and the sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rflow_jax.errors import InputError
from rflow_jax.flow import Schedule, condition_delta, euler, guided, image_ids, pack, rope_for, unpack
from rflow_jax.models.flux.config import FluxConfig

SIDES = st.integers(1, 5)
NUMBERS = st.floats(-3, 3, width=32, allow_subnormal=False)  # XLA takes subnormal numbers for 0


@settings(max_examples=10)  # each shape is compiled
@given(SIDES, SIDES, st.integers(1, 3), st.integers(1, 2))
def test_unpack_is_the_inverse_of_pack(rows, columns, z, b):
    latents = np.arange(b * rows * columns * 4 * z, dtype=np.float32).reshape(b, 2 * rows, 2 * columns, z)
    tokens = pack(jnp.asarray(latents))
    assert tokens.shape == (b, rows * columns, 4 * z)
    np.testing.assert_array_equal(unpack(tokens, 2 * rows, 2 * columns), latents)


def test_a_token_is_a_patch_with_its_channels_outermost():
    latents = jnp.arange(2 * 4 * 2).reshape(1, 2, 4, 2).astype(jnp.float32)
    second = pack(latents)[0, 1]
    np.testing.assert_array_equal(second, latents[0, :2, 2:4].transpose(2, 0, 1).ravel())


def test_the_condition_lies_left_of_the_image():
    ids = image_ids(2, 3, delta=condition_delta(3))
    assert ids[:, 2].max() == -1
    assert ids[:, 2].min() == -3
    assert set(ids[:, 1]) == {0, 1}


def test_text_is_not_turned():
    config = FluxConfig()
    rope = rope_for(config, 5, (2, 2), (1, 1))
    assert rope.cos.shape == (5 + 4 + 1, config.attention_head_dim // 2)
    np.testing.assert_array_equal(rope.cos[:5], 1)
    np.testing.assert_array_equal(rope.sin[:5], 0)
    np.testing.assert_allclose(np.square(rope.cos) + np.square(rope.sin), 1, atol=1e-6)


@given(st.integers(1, 60), st.integers(1, 8192), st.booleans())
def test_sigmas_fall_from_one_to_zero(steps, tokens, dynamic):
    sigmas = Schedule(use_dynamic_shifting=dynamic, shift=1.0).sigmas(steps, tokens)
    assert sigmas.shape == (steps + 1,)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert np.all(np.diff(sigmas) < 0)


def test_a_shift_of_one_is_none():
    np.testing.assert_allclose(Schedule(False, shift=1.0).sigmas(4, 4096), [1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize(
    "bad",
    [
        {"_class_name": "DDIMScheduler"},
        {"use_karras_sigmas": True},
        {"shift_terminal": 0.1},
        {"shift": 0.0},
        {"max_image_seq_len": 256},
    ],
)
def test_other_schedules_are_refused(bad):
    with pytest.raises(InputError, match=r"scheduler_config\.json"):
        Schedule.from_json(bad)


def test_euler_is_exact_where_the_velocity_is_constant():
    noise, clean = jax.random.normal(jax.random.key(0), (2, 1, 3, 4))
    x, steps = euler(lambda x, t, k: noise - clean, noise, jnp.asarray(Schedule().sigmas(5, 1024)))
    np.testing.assert_allclose(x, clean, atol=1e-6)
    assert steps.shape == (5, 1, 3, 4)
    np.testing.assert_array_equal(steps[-1], x)


def test_euler_tells_the_velocity_its_time():
    sigmas = jnp.asarray(Schedule().sigmas(3, 256))
    x, _ = euler(lambda x, t, k: jnp.full_like(x, t), jnp.zeros((1, 1, 1)), sigmas)
    expected = sum((sigmas[k + 1] - sigmas[k]) * sigmas[k] for k in range(3))
    np.testing.assert_allclose(x[0, 0, 0], expected, rtol=1e-6)


@given(NUMBERS, NUMBERS)
def test_guidance_of_one_is_the_condition(c, u):
    condition, black = jnp.asarray(c), jnp.asarray(u)
    np.testing.assert_allclose(guided(condition, black, 1.0), condition, atol=1e-6)
    np.testing.assert_array_equal(guided(condition, black, 0.0), black)
