"""The pipeline: what a picture depends on, and what it does not."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import rflow_jax
from rflow_jax import InputError, SamplingConfig, load_pipeline
from rflow_jax.generation.pipeline import Pipeline, Request
from rflow_jax.generation.sampling import PerturbedSeed, StaticArgs, draw_noise, noise_draws, sample_keys
from rflow_jax.models.flux.config import ConditionFlags
from rflow_jax.models.flux.transformer import abstract_flux
from rflow_jax.models.lora import Adapter, linear_shapes
from rflow_jax.parallel.mesh import MeshConfig, make_mesh
from rflow_jax.tokenizers.flux import Tokenizers, t5_prompt
from rflow_jax.utils.images import condition_pixels, fit_to_grid
from rflow_jax.weights import flux as bundle
from rflow_jax.weights.components import TRANSFORMER
from rflow_jax.weights.lora.export import save_lora

SMALL = SamplingConfig(
    height=32, width=48, num_inference_steps=2, condition_size=32, batch_size=3, max_sequence_length=24
)
PROMPTS = ["a cat", "two dogs", "a red cup"]


@pytest.fixture(scope="module")
def pipe(golden_module):
    return load_pipeline(
        str(golden_module / "pipeline"), lora=str(golden_module / "lora"), dtype="float32", progress=False
    )


@pytest.fixture(scope="module")
def golden_module(request):
    return request.getfixturevalue("golden")


def _pictures(n: int) -> list[Image.Image]:
    rng = np.random.default_rng(n)
    return [Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)) for _ in range(n)]


def _generate(pipe, order=(0, 1, 2), settings=SMALL, **how) -> list[np.ndarray]:
    conditions, reflections = _pictures(3), ["Add a hat.", "Make it one dog.", ""]
    images = pipe.generate(
        [PROMPTS[k] for k in order],
        **{
            "seeds": [(7, k) for k in order],
            "conditions": [conditions[k] for k in order],
            "reflections": [reflections[k] for k in order],
            "settings": settings,
        }
        | how,
    )
    return [np.asarray(image) for image in images]


@pytest.fixture(scope="module")
def reference(pipe):
    return _generate(pipe)


def test_size_and_content(reference):
    assert [image.shape for image in reference] == [(32, 48, 3)] * 3
    assert all(image.std() > 1 for image in reference)
    assert not np.array_equal(reference[0], reference[1])


def test_bit_equal_in_any_slot_with_any_neighbours(pipe, reference):
    for order in ((1, 2, 0), (2, 2, 1), (0, 0, 0)):
        for image, k in zip(_generate(pipe, order), order, strict=True):
            np.testing.assert_array_equal(image, reference[k])


def test_a_part_filled_batch_changes_nothing(pipe, reference):
    images = _generate(pipe, (0, 1, 2, 1))
    assert len(images) == 4
    for image, k in zip(images, (0, 1, 2, 1), strict=True):
        np.testing.assert_array_equal(image, reference[k])


def test_across_batch_sizes_equal_to_rounding(pipe, reference):
    single = _generate(pipe, (1,), dataclasses.replace(SMALL, batch_size=1))[0]
    assert np.abs(single.astype(int) - reference[1].astype(int)).max() <= 1


def test_every_input_counts(pipe, reference):
    changes = {
        "another condition": {"conditions": _pictures(4)[1:]},
        "another reflection": {"reflections": ["Remove the hat."] * 3},
        "a refined prompt": {"refined_prompts": ["a striped cat", "two small dogs", "a dark red cup"]},
        "other seeds": {"seeds": [1, 2, 3]},
        "guidance": {"settings": dataclasses.replace(SMALL, guidance_scale=1.0)},
    }
    for what, how in changes.items():
        for one, other in zip(_generate(pipe, **how), reference, strict=True):
            assert not np.array_equal(one, other), what


@pytest.mark.parametrize("scale", [{"image_guidance_scale": 1.5}, {"condition_scale": 0.7}])
def test_scales_have_an_effect(pipe, reference, scale):
    scaled = dataclasses.replace(SMALL, **scale)
    assert not np.array_equal(_generate(pipe, settings=scaled)[0], reference[0])


def test_a_lora_that_could_have_no_effect_is_refused(pipe):
    with pytest.raises(InputError, match="without a condition it has no effect"):
        pipe.generate(["a cat"], seeds=[0], settings=SMALL)


def test_settings_that_hide_the_condition_leave_a_lora_without_effect(pipe):
    with pytest.raises(InputError, match="the image does not see these"):
        _generate(pipe, settings=dataclasses.replace(SMALL, union_cond_attn=False))


@pytest.fixture
def no_work(monkeypatch):
    """Everything is checked, and nothing generated."""
    monkeypatch.setattr(Pipeline, "_batches", lambda *_: iter(()))


def _with_lora(golden, folder, *paths: str):
    """The golden pipeline with a random LoRA on these linears."""
    shapes, rng = linear_shapes(abstract_flux(TRANSFORMER.read_config(golden / "pipeline"))), np.random.default_rng(0)
    adapters = {
        path: Adapter(rng.normal(size=(2, shapes[path][0])), rng.normal(size=(shapes[path][1], 2))) for path in paths
    }
    save_lora(adapters, folder / "lora")
    return load_pipeline(str(golden / "pipeline"), lora=str(folder / "lora"), dtype="float32", progress=False)


def test_a_lora_on_text_and_head_alone_is_refused_unless_latent(golden, tmp_path, no_work):
    last = len(TRANSFORMER.abstract(TRANSFORMER.read_config(golden / "pipeline")).single_blocks) - 1
    pipe = _with_lora(
        golden, tmp_path, "text_in", "double_blocks.0.text.qkv.q", "final_out", f"single_blocks.{last}.out"
    )
    with pytest.raises(InputError, match=r"its 4 adapters, such as .*: set latent_lora"):
        _generate(pipe)
    assert _generate(pipe, settings=dataclasses.replace(SMALL, latent_lora=True)) == []


def test_a_lora_of_which_a_part_acts_is_told_once(golden, tmp_path, caplog, no_work):
    pipe = _with_lora(golden, tmp_path, "text_in", "final_out", "image_in")
    assert _generate(pipe) == _generate(pipe) == []
    assert caplog.messages == [
        "2 of the LoRA's 3 adapters have no effect without latent_lora: no condition token passes through their "
        "linears, such as final_out"
    ]


def test_without_lora_is_the_base_model(pipe, golden, reference):
    base = load_pipeline(str(golden / "pipeline"), dtype="float32", progress=False)
    bare = pipe.without_lora()
    assert pipe.without_lora() is bare
    assert bare.bundle.weights["vae"] is pipe.bundle.weights["vae"]
    for one, other, with_lora in zip(_generate(bare), _generate(base), reference, strict=True):
        np.testing.assert_array_equal(one, other)
        assert not np.array_equal(one, with_lora)


def test_other_weights_run_in_the_same_programs(pipe, reference):
    base, lora = pipe.bundle.weights["transformer"]
    without = pipe.with_weights(pipe.bundle.weights | {"transformer": (base, jax.tree.map(lambda x: 0 * x, lora))})
    assert without.sample is pipe.sample
    for one, bare, with_lora in zip(_generate(without), _generate(pipe.without_lora()), reference, strict=True):
        np.testing.assert_allclose(one, bare, atol=1)  # of 255
        assert not np.array_equal(one, with_lora)
    np.testing.assert_array_equal(_generate(pipe)[0], reference[0])


def test_pictures_are_handed_over_batch_by_batch(pipe):
    seen = []
    images = pipe.generate(
        [PROMPTS[0]] * 4,
        seeds=[0, 1, 2, 3],
        conditions=_pictures(1) * 4,
        settings=SMALL,
        on_images=lambda first, batch: seen.append((first, len(batch))),
    )
    assert seen == [(0, 3), (3, 1)]
    assert len(images) == 4


@pytest.mark.parametrize("mesh", [MeshConfig(data=2), MeshConfig(data=2, fsdp=2)], ids=["data", "data and fsdp"])
def test_every_device_makes_images_as_if_it_were_alone(golden, pipe, reference, mesh):
    """Five requests are one full batch and one that is padded, over two devices with three places each."""
    devices = jax.devices()[: 2 * mesh.fsdp]
    how = {"lora": str(golden / "lora"), "dtype": "float32", "progress": False, "mesh": make_mesh(mesh, devices)}
    spread = load_pipeline(str(golden / "pipeline"), **how)
    assert spread.images_at_once(SMALL) == 6
    order = (0, 1, 2, 2, 1, 0, 1)
    for image, k in zip(_generate(spread, order), order, strict=True):
        if mesh.fsdp == 1:
            np.testing.assert_array_equal(image, reference[k])
        else:  # products over cut weights round otherwise
            assert np.abs(image.astype(int) - reference[k].astype(int)).max() <= 1


def test_a_batch_can_be_sent_on_its_way(pipe, reference):
    requests = [
        Request(PROMPTS[k], (7, k), _pictures(3)[k], reflection) for k, reflection in ((0, "Add a hat."), (2, ""))
    ]
    sent = [pipe.start(requests, SMALL), pipe.start(requests[::-1], SMALL)]
    for pending, order in zip(sent, ((0, 2), (2, 0)), strict=True):
        for image, k in zip(pending.images(), order, strict=True):
            np.testing.assert_array_equal(np.asarray(image), reference[k])
    with pytest.raises(ValueError, match="1 to 3 requests, not 4"):
        pipe.start(requests * 2, SMALL)


def _noise(*seeds) -> np.ndarray:
    program = StaticArgs(256, 256, None, 16, ConditionFlags(), False, False)
    return np.asarray(draw_noise(program, (32, 32, 16), noise_draws(seeds)), np.float64)


def test_neighbours_lie_at_their_angle_and_are_standard_normal():
    origin, near, further, other = _noise(
        (1, 0), PerturbedSeed(((1, 0), (1, 1)), 0.9), PerturbedSeed(((1, 0), (1, 1), (1, 2)), 0.9), 5
    )

    def cosine(a, b):
        return (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)

    assert cosine(origin, near) == pytest.approx(0.9, abs=0.02)
    assert cosine(near, further) == pytest.approx(0.9, abs=0.02)
    assert cosine(origin, further) == pytest.approx(0.81, abs=0.02)
    assert abs(cosine(origin, other)) < 0.02
    for noise in (origin, near, further):
        assert noise.std() == pytest.approx(1, abs=0.02)


def test_the_noise_of_a_seed_is_the_same_beside_neighbours():
    alone, near = _noise(3), PerturbedSeed((3, 4, 5), 0.95)
    np.testing.assert_array_equal(_noise(3, near)[:1], alone)
    np.testing.assert_array_equal(_noise(near)[:1], _noise(PerturbedSeed((3, 4), 0.5), near)[1:])
    np.testing.assert_array_equal(_noise(PerturbedSeed((3,), 0.5)), alone)


def test_nothing_to_do(pipe):
    assert pipe.generate([], seeds=[], settings=SMALL) == []


def test_sizes_follow_the_models_own_grid(pipe, monkeypatch):
    monkeypatch.setattr(bundle.FluxModel, "token_pixels", 32)
    with pytest.raises(InputError, match=r"width is 48: .*pipeline makes images in multiples of 32 pixels"):
        _generate(pipe)


@pytest.mark.parametrize("how", [{"seeds": [0]}, {"conditions": _pictures(1)}, {"reflections": ["x"]}])
def test_lists_of_different_lengths(pipe, how):
    with pytest.raises(InputError, match="one for each prompt"):
        _generate(pipe, **how)


def test_a_condition_for_some_prompts_only(pipe):
    with pytest.raises(InputError, match="1 of 3 prompts have no condition"):
        _generate(pipe, conditions=[*_pictures(2), None])
    with pytest.raises(InputError, match="without a condition it has no effect"):
        _generate(pipe, conditions=[None] * 3)


def test_seeds_of_numpy_are_seeds():
    seeds = [7, (7, 1)]
    same = [np.int64(7), (np.uint32(7), np.int8(1))]
    np.testing.assert_array_equal(*(jax.random.key_data(sample_keys(each)) for each in (seeds, same)))


def test_seeds_of_any_size_give_different_keys():
    seeds = [0, 1, 2**32, 2**32 + 1, 2**70, (0, 1), (1, 0), (0, 0, 1)]
    data = jax.random.key_data(sample_keys(seeds))
    assert len({tuple(key) for key in data.tolist()}) == len(seeds)
    for bad in (-1, (), (1, -2), True, (1, False), np.int64(-1)):
        with pytest.raises(InputError, match="whole number"):
            sample_keys([bad])


def test_the_format_of_reflections():
    assert t5_prompt("a cat", "Add a hat.") == "a cat [Reflexion] Add a hat."
    assert t5_prompt("a cat", "") == t5_prompt("a cat") == "a cat"


def test_pictures_for_the_network():
    picture = Image.new("L", (53, 43), 200)
    assert fit_to_grid(picture, 16).size == (48, 32)
    assert fit_to_grid(Image.new("RGB", (5, 5)), 16).size == (16, 16)
    assert condition_pixels(picture, 32).shape == (32, 32, 3)


def test_a_lora_for_another_network_is_refused_before_the_weights_are_read(golden, tmp_path, monkeypatch):
    save_lora({"image_in": Adapter(np.ones((2, 5)), np.ones((7, 2)))}, tmp_path / "other.safetensors")
    monkeypatch.setattr(bundle, "_load_networks", lambda *_: pytest.fail("read"))
    with pytest.raises(InputError, match="for another network"):
        load_pipeline(str(golden / "pipeline"), lora=str(tmp_path / "other.safetensors"), progress=False)


def test_special_tokens_with_their_properties(golden, tmp_path):
    shutil.copytree(golden / "pipeline", tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_2" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["pad_token"] = {"__type": "AddedToken", "content": config["pad_token"], "special": True}
    file.write_text(json.dumps(config))
    ids = [Tokenizers(folder).t5(["a cat"], 9) for folder in (golden / "pipeline", tmp_path / "model")]
    np.testing.assert_array_equal(*ids)


def test_errors_name_what_to_do(golden, tmp_path):
    for model, message in (
        ("./nowhere/at/all", "not a Hub id"),
        ("../none", "not a Hub id"),
        (str(tmp_path), "is not a model"),
        (str(golden / "pipeline" / "transformer" / "config.json"), "is not a FLUX transformer|not a safetensors file"),
    ):
        with pytest.raises(InputError, match=message) as error:
            load_pipeline(model, progress=False)
        assert "\n" not in str(error.value)
    shutil.copytree(golden / "pipeline", tmp_path / "part", ignore=shutil.ignore_patterns("tokenizer_2"))
    with pytest.raises(InputError, match="has no tokenizer_2"):
        load_pipeline(str(tmp_path / "part"), progress=False)
    for dtype, message in (("int7", "give bfloat16 or float32"), ("float16", "use bfloat16")):
        with pytest.raises(InputError, match=message):
            load_pipeline(str(golden / "pipeline"), dtype=dtype)
    with pytest.raises(InputError, match="not a Hub id"):
        load_pipeline(str(golden / "pipeline"), lora=str(tmp_path / "none.safetensors"), progress=False)


def test_a_text_is_not_taken_for_a_list_of_prompts(pipe):
    with pytest.raises(InputError, match="prompts is the text 'a cat'; give a list of prompts"):
        pipe.generate("a cat", seeds=range(5), settings=SMALL)


def test_the_public_names_are_where_the_table_says():
    assert dir(rflow_jax) == rflow_jax.__all__
    assert all(getattr(rflow_jax, name).__name__ == name for name in rflow_jax.__all__)
