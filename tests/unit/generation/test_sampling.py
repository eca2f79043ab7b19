"""The pipeline's compiled programs: what they compute in, and what each switch of the settings does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rflow_jax import InputError, SamplingConfig, load_pipeline
from rflow_jax.generation.sampling import NOISE, sample_keys
from rflow_jax.parallel.runtime import reproducible
from tests.kit.programs import products, traced

SMALL = SamplingConfig(height=32, width=32, num_inference_steps=1, condition_size=32, max_sequence_length=16)
BAD = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
OTHER = Image.fromarray(255 - np.asarray(BAD))
PINNED_KEYS = [[2607350393, 2391420132], [1513106063, 4237746388]]
PINNED_NOISE = [0.22588126, -0.16289361, 0.77910632, 0.31557518]


def _load(golden, dtype):
    return load_pipeline(str(golden / "pipeline"), lora=str(golden / "lora"), dtype=dtype, progress=False)


@pytest.fixture(scope="module")
def pipe(request):
    return _load(request.getfixturevalue("golden"), "float32")


def _image(pipe, condition=BAD, **changes):
    settings = dataclasses.replace(SMALL, **changes)
    return np.asarray(pipe.generate(["a cat"], seeds=[3], conditions=[condition], settings=settings)[0], np.int32)


def _traced(pipe, **changes):
    return traced(pipe, "a cat", conditions=[BAD], settings=dataclasses.replace(SMALL, **changes))


# ---- number types ----


@pytest.mark.parametrize("how", [{}, {"condition_scale": 0.5, "image_guidance_scale": 1.5, "vae_tiling": True}])
def test_in_bfloat16_every_product_is_of_bfloat16(golden, how):
    for name, jaxpr in _traced(_load(golden, "bfloat16"), **how).items():
        found = list(products(jaxpr))
        assert len(found) > 20, name
        for equation in found:
            assert {operand.aval.dtype for operand in equation.invars} == {jnp.dtype(jnp.bfloat16)}, (name, equation)


def test_in_float32_every_product_is_of_float32_in_full(pipe):
    highest = jax.lax.Precision.HIGHEST
    for name, jaxpr in _traced(pipe).items():
        for equation in products(jaxpr):
            assert equation.params["precision"] in (highest, (highest, highest)), (name, equation)


def test_in_bfloat16_the_precision_is_the_devices(golden):
    for jaxpr in _traced(_load(golden, "bfloat16")).values():
        assert {equation.params["precision"] for equation in products(jaxpr)} == {None}


# ---- random numbers ----


@pytest.mark.parametrize("partitionable", [True, False])
def test_the_numbers_of_a_seed_are_these(pipe, partitionable):
    """A picture can be made again from its seed for as long as this test passes unchanged."""
    keys = sample_keys([7, (7, 0, 1)])
    assert jax.random.key_data(keys).tolist() == PINNED_KEYS
    with jax.threefry_partitionable(partitionable):
        with reproducible(jnp.float32):
            draw = jax.jit(lambda key: jax.random.normal(jax.random.fold_in(key, NOISE), (4,)))(keys[0])
        np.testing.assert_allclose(draw, PINNED_NOISE, rtol=1e-6)


def test_images_do_not_depend_on_how_jax_is_set(pipe):
    images = []
    for partitionable in (True, False):
        with jax.threefry_partitionable(partitionable):
            images.append(_image(pipe))
    np.testing.assert_array_equal(*images)


# ---- switches ----


@pytest.fixture(scope="module")
def plain(pipe):
    return _image(pipe)


def test_tiling_leaves_small_pictures_alone(pipe, plain):
    np.testing.assert_array_equal(_image(pipe, vae_tiling=True), plain)


@pytest.mark.parametrize("large", [{"height": 96, "width": 80}, {"condition_size": 96}])
def test_tiling_of_large_pictures_and_conditions(pipe, large):
    whole, tiled = _image(pipe, **large), _image(pipe, **large, vae_tiling=True)
    assert whole.shape == tiled.shape
    # Each tile is normalised by itself, and here a tile is few pixels: alike, and not the same.
    assert 0 < np.abs(whole - tiled).mean() < whole.std() / 4


def test_without_union_attention_the_image_does_not_see_the_condition(pipe, plain):
    assert not np.array_equal(_image(pipe, OTHER), plain)
    apart = {"union_cond_attn": False, "latent_lora": True}
    np.testing.assert_array_equal(_image(pipe, **apart), _image(pipe, OTHER, **apart))


def test_added_attention_shows_the_condition_also_without_union(pipe, plain):
    added = {"add_cond_attn": True}
    assert not np.array_equal(_image(pipe, **added), plain)
    added |= {"union_cond_attn": False}
    assert not np.array_equal(_image(pipe, **added), _image(pipe, OTHER, **added))
    with pytest.raises(InputError, match="as many condition tokens as image tokens, not 16 and 4"):
        _image(pipe, **added, condition_size=64)
