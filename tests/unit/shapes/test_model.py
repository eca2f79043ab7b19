"""The new model of the shapes world: its words and tokens, its parameters, and folders in diffusers' layout."""

from __future__ import annotations

import json
from random import Random

import jax.numpy as jnp
import numpy as np
import pytest

from rflow_jax.commands.main import main
from rflow_jax.errors import InputError
from rflow_jax.generation.config import SamplingConfig
from rflow_jax.generation.pipeline import load_pipeline
from rflow_jax.shapes.edits import reflection, repair, spoil
from rflow_jax.shapes.grammar import held_out_prompts, parse, sample_prompt
from rflow_jax.shapes.model import DEFAULTS, DEFAULTS_KEY, new_network, save_pipeline, sizes, write_start
from rflow_jax.shapes.scenes import make_scene
from rflow_jax.shapes.vocabulary import CLIP_LENGTH, T5_LENGTH, clip_tokenizer, t5_tokenizer, words
from rflow_jax.tokenizers.flux import REFLECTION_MARK, Tokenizers, t5_prompt
from rflow_jax.weights.components import CLIP, COMPONENTS, T5, TRANSFORMER, VAE
from rflow_jax.weights.loading import parameter_values

UNKNOWN = 2  # T5's token


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "start"
    assert main(["shapes", "model", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def texts():
    """Prompts, and prompts with reflections."""
    rng, found = Random(0), []
    for prompt in [*(sample_prompt(rng) for _ in range(300)), *held_out_prompts(60)]:
        edits, _ = repair(prompt, spoil(make_scene(prompt, rng), prompt, rng))
        found.append((prompt.text, t5_prompt(prompt.text, reflection(edits))))
    return found


def test_every_word_is_one_token_in_any_case():
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    for word in (*words(), ",", "."):
        for text in (word, word.upper(), f"a {word} ."):
            between = slice(2, -2) if text.startswith("a ") and len(text.split()) == 3 else slice(1, -1)
            assert clip.encode(text).tokens[between] == [f"{word}</w>"]
            assert clip.encode(text).ids == clip.encode(text.lower()).ids
            assert len(t5.encode(text).ids) == len(text.split()) + 1
            assert UNKNOWN not in t5.encode(text).ids
    assert t5.encode(REFLECTION_MARK).tokens == [f"▁{REFLECTION_MARK.lower()}", "</s>"]


def test_all_texts_of_the_world_are_known_and_fit(start, texts):
    tokenizers = Tokenizers(start)
    prompts, with_reflections = map(list, zip(*texts, strict=True))
    assert tokenizers.lengths(prompts)[0].max() <= CLIP_LENGTH
    assert tokenizers.lengths(with_reflections)[1].max() <= T5_LENGTH
    ids = tokenizers.t5(with_reflections, T5_LENGTH)
    assert ids.max() < sizes()[T5.folder].vocab_size
    assert not (ids == UNKNOWN).any()
    # Different texts have different tokens.
    assert len(np.unique(ids, axis=0)) == len(set(with_reflections))


def test_other_words_are_bytes_or_unknown(start):
    tokenizers = Tokenizers(start)
    text = "A fünny élan\nof 17 starfish: naïve, 星 <|startoftext|>"
    assert (tokenizers.t5([text], T5_LENGTH) == UNKNOWN).sum() > 3
    clip = tokenizers.clip([text], 64)[0]
    assert clip[0] == sizes()[CLIP.folder].eos_token_id - 1
    assert (clip == sizes()[CLIP.folder].eos_token_id).sum() > 1
    np.testing.assert_array_equal(tokenizers.clip([""], 4), [[clip[0], *[clip[0] + 1] * 3]])


def test_transformers_own_classes_give_the_same_tokens(start, texts):
    from transformers import AutoTokenizer, CLIPTokenizer, T5TokenizerFast

    ours = Tokenizers(start)
    more = [(text.title(), text.upper()) for text, _ in texts[:5]] + [("", ""), ("a fünny 17 star.", "a fünny star.")]
    prompts, reflections = map(list, zip(*texts, *more, strict=True))
    for clip in (
        CLIPTokenizer.from_pretrained(start / "tokenizer"),
        AutoTokenizer.from_pretrained(start / "tokenizer"),
    ):
        found = clip(prompts, padding="max_length", max_length=CLIP_LENGTH, truncation=True)["input_ids"]
        np.testing.assert_array_equal(found, ours.clip(prompts, CLIP_LENGTH))
        assert clip.model_max_length == CLIP_LENGTH
    for t5 in (
        T5TokenizerFast.from_pretrained(start / "tokenizer_2"),
        AutoTokenizer.from_pretrained(start / "tokenizer_2"),
    ):
        found = t5(reflections, padding="max_length", max_length=T5_LENGTH, truncation=True)["input_ids"]
        np.testing.assert_array_equal(found, ours.t5(reflections, T5_LENGTH))
        assert len(t5) == sizes()[T5.folder].vocab_size


def test_sizes_and_first_values():
    counts = {}
    for component in COMPONENTS:
        values = parameter_values(new_network(component, sizes()[component.folder], seed=0))
        counts[component.folder] = sum(value.size for value in values.values())
        assert all(value.dtype == jnp.float32 for value in values.values())
        if component is TRANSFORMER:
            zero = {path for path, value in values.items() if path.endswith("kernel") and not np.any(value)}
            blocks = {f"double_blocks.{k}.{side}.mod.kernel" for k in range(2) for side in ("image", "text")}
            blocks |= {f"single_blocks.{k}.mod.kernel" for k in range(6)}
            assert zero == blocks | {"final_mod.kernel", "final_out.kernel"}
            assert np.std(values["single_blocks.3.mlp.kernel"]) == pytest.approx(256**-0.5, rel=0.02)
        if component is T5:
            assert np.std(values["blocks.1.attn.q.kernel"]) == pytest.approx((128 * 32) ** -0.5, rel=0.02)
    assert counts == {"transformer": 11_078_464, "vae": 1_237_891, "text_encoder": 419_712, "text_encoder_2": 648_064}


def test_seeds_are_different_models():
    config = sizes()[T5.folder]
    first, again, other = (parameter_values(new_network(T5, config, seed)) for seed in (0, 0, 1))
    path = "blocks.0.ff.up.kernel"
    np.testing.assert_array_equal(first[path], again[path])
    assert np.any(first[path] != other[path])
    assert np.any(first[path] != first["blocks.1.ff.up.kernel"])


def test_the_folder_makes_a_picture_with_the_settings_it_records(start):
    recorded = json.loads((start / "model_index.json").read_text())[DEFAULTS_KEY]
    assert recorded == DEFAULTS
    settings = SamplingConfig(num_inference_steps=2)
    pipe = load_pipeline(str(start), dtype="float32", progress=False)
    assert {name: getattr(pipe.resolve(SamplingConfig()), name) for name in DEFAULTS} == DEFAULTS
    assert pipe.resolve(SamplingConfig(height=32)).height == 32
    (picture,) = pipe.generate([parse("a red star").text], seeds=[0], settings=settings)
    assert picture.size == (96, 96)


def test_a_network_is_exchanged_and_the_rest_kept(start, tmp_path):
    vae = new_network(VAE, sizes()["vae"], seed=5)
    change = {"vae": {"scaling_factor": 0.5, "shift_factor": -0.25}}
    save_pipeline(tmp_path / "new", {"vae": vae}, base=start, changes=change, dtype=jnp.bfloat16)
    new, old = (
        {file.relative_to(root): file.read_bytes() for file in root.rglob("*") if file.is_file()}
        for root in (tmp_path / "new", start)
    )
    assert new.keys() == old.keys()
    different = {str(path) for path in new if new[path] != old[path]}
    assert different == {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    pipe = load_pipeline(str(tmp_path / "new"), dtype="float32", progress=False)
    assert (pipe.bundle.vae_config.scaling_factor, pipe.bundle.vae_config.shift_factor) == (0.5, -0.25)
    kernel = pipe.bundle.weights["vae"]["encoder"]["conv_in"]["kernel"].get_value()
    np.testing.assert_array_equal(kernel, vae.encoder.conv_in.kernel[...].astype(jnp.bfloat16).astype(jnp.float32))


def test_what_cannot_be_written_is_one_line(start, tmp_path):
    with pytest.raises(InputError, match="start: exists already"):
        write_start(start)
    with pytest.raises(InputError, match="seed is -1"):
        main(["shapes", "model", str(tmp_path / "x"), "--seed=-1"])
    with pytest.raises(InputError, match="missing: out"):
        main(["shapes", "model"])
    with pytest.raises(InputError, match="no such file or folder"):
        save_pipeline(tmp_path / "new", {}, base=tmp_path / "none")
