"""Programs of verifiers and writers without their weights: what they take is what the real ones are given."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from rflow_jax.aot.verifiers import local_models, verifier_programs
from rflow_jax.errors import InputError
from rflow_jax.generation.config import SamplingConfig
from rflow_jax.search.config import ReflectStage, SearchConfig
from rflow_jax.verifiers import reward
from rflow_jax.verifiers.config import VERIFIERS, NvilaVerifierConfig, RewardVerifierConfig
from rflow_jax.verifiers.nvila import NvilaVerifier
from rflow_jax.verifiers.reward import RewardVerifier
from rflow_jax.vlm import nvila_programs, qwen_chat
from rflow_jax.vlm.config import QwenChatConfig
from rflow_jax.vlm.nvila_programs import padded_length
from rflow_jax.vlm.qwen_batching import LEAST_TOKENS, bucket
from rflow_jax.vlm.qwen_chat import ChatQuery, QwenChat
from rflow_jax.writers.base import QwenTextGeneratorConfig

SIZE = (160, 96)
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8))
SETTINGS = SamplingConfig(width=SIZE[0], height=SIZE[1])
SEVEN_B = "Qwen/Qwen2.5-VL-7B-Instruct"


@pytest.fixture(scope="module")
def qwen(golden, tmp_path_factory):
    root = tmp_path_factory.mktemp("aot") / "qwen"
    shutil.copytree(golden / "qwen", root)
    return root


def verifying(name, model, **options):
    return SearchConfig(
        model="m", sampling=SETTINGS, verifier=VERIFIERS.parse({"name": name, "model": model} | options)
    )


def writing(model, **options):
    writer = QwenTextGeneratorConfig(model, **options)
    return SearchConfig(model="m", sampling=SETTINGS, reflector=writer, refiner=writer)


def same_places(shapes, weights, without=()):
    """Shapes, number types and shardings; a kernel in 8 bits is two arrays."""
    wanted, found = (dict(nnx.to_flat_state(state)) for state in (weights, shapes))
    assert wanted.keys() == found.keys()
    for path, variable in wanted.items():
        if path in without:
            continue
        real, stand_in = (jax.tree.leaves(one.get_value()) for one in (variable, found[path]))
        for array, shape in zip(real, stand_in, strict=True):
            assert (array.shape, array.dtype) == (shape.shape, shape.dtype), path
            assert array.sharding.is_equivalent_to(shape.sharding, array.ndim), path
    return True


def given(monkeypatch, module, name):
    """The shapes that a program is called with."""
    seen, program = [], getattr(module, name)

    def called(*args, **how):
        seen.append([(np.shape(leaf), leaf.dtype) for leaf in jax.tree.leaves(args) if hasattr(leaf, "dtype")])
        return program(*args, **how)

    monkeypatch.setattr(module, name, called)
    return seen


def taken(program):
    return [(shape.shape, shape.dtype) for shape in jax.tree.leaves(program.lower().in_avals) if shape.shape]


def inputs_of(shapes, weights):
    """The shapes that follow those of the weights."""
    return shapes[len(jax.tree.leaves(weights)) :]


def prompt_of(tokens, padded):
    """A prompt with which a question is padded to so many tokens; small models' tokenizers know few words."""
    return next(prompt for prompt in ("a " * words for words in range(1, 500)) if padded(prompt) == tokens)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_reward_model_is_compiled_for_what_it_is_given(qwen, monkeypatch, quantization):
    options = {"dtype": "float32", "batch_size": 2, "devices": (4, 5), "quantization": quantization}
    verifier = RewardVerifier(RewardVerifierConfig(str(qwen / "reward"), **options))
    [model] = local_models(verifying("reward", str(qwen / "reward"), **options), jax.devices())
    assert model.devices == tuple(jax.devices()[4:6])
    # A checkpoint may have fewer rows than its base.
    assert same_places(model.weights, verifier._state, [("language", "embed", "embedding")])
    calls, [program] = given(monkeypatch, reward, "rewards"), model.programs
    wanted = inputs_of(taken(program), model.weights)
    prompt = prompt_of(wanted[0][0][1], lambda text: bucket(len(verifier._sample(IMAGE, text).ids), LEAST_TOKENS))
    assert verifier.score([IMAGE], [{"prompt": prompt}])[0].error is None
    assert inputs_of(calls[0], model.weights) == wanted
    assert program.flops > 0
    assert program.devices == 2
    assert program.hbm_bytes > 0


def test_nvila_is_compiled_for_what_it_is_given(golden, monkeypatch):
    checkpoint = str(golden / "nvila" / "checkpoint")
    options = {"dtype": "float32", "batch_size": 2, "devices": (1, 2, 3, 4), "quantization": "int8"}
    verifier = NvilaVerifier(NvilaVerifierConfig(checkpoint, **options))
    [model] = local_models(verifying("nvila", checkpoint, **options), jax.devices())
    assert same_places(model.weights, verifier.model.weights)
    wanted = list(map(taken, model.programs))
    calls = [given(monkeypatch, nvila_programs, name) for name in ("look", "answer")]
    context = verifier.model.tokenizer.context
    length = inputs_of(wanted[1], model.weights)[0][0][1]
    prompt = prompt_of(length, lambda text: padded_length(len(verifier._question(IMAGE, text).layout), context))
    assert verifier.score([IMAGE], [{"prompt": prompt}])[0].error is None
    for seen, shapes in zip(calls, wanted, strict=True):
        assert seen[0] == shapes


def test_a_writer_is_compiled_for_what_it_is_given(qwen, monkeypatch):
    options = {"dtype": "float32", "batch_size": 2, "devices": (6, 7), "max_new_tokens": 3}
    chat = QwenChat(QwenChatConfig(str(qwen / "base"), **options))
    [model] = local_models(writing(str(qwen / "base"), **options), jax.devices())
    assert same_places(model.weights, chat._state)
    calls = given(monkeypatch, qwen_chat, "texts")
    assert isinstance(chat.answer([ChatQuery("Say what is there.", ("a bench", IMAGE))])[0], str)
    # They differ in the tokens of what is said alone.
    found, wanted = taken(model.programs[0]), calls[0]
    assert [(len(shape), dtype) for shape, dtype in found] == [(len(shape), dtype) for shape, dtype in wanted]
    pictures = [shape for shape, dtype in wanted if dtype == np.uint8]
    assert pictures == [shape for shape, dtype in found if dtype == np.uint8]
    made = model.programs[0].lower().compile().output_shardings
    assert {device for leaf in jax.tree.leaves(made) for device in leaf.device_set} == set(jax.devices()[6:8])


def test_models_on_the_same_device_are_resident_beside_each_other(golden, qwen):
    checkpoint = str(golden / "nvila" / "checkpoint")
    members = [{"name": "nvila", "model": checkpoint, "devices": devices} for devices in ([0, 1], [1], [5])]
    config = SearchConfig(
        model="m", sampling=SETTINGS, verifier=VERIFIERS.parse({"name": "ensemble", "members": members})
    )
    first, _, second, _, third, _ = verifier_programs(config, jax.devices())
    assert [one.name for one in (first, third)] == ["verifier 1 nvila look", "verifier 3 nvila look"]
    assert first.resident_bytes > second.resident_bytes > third.resident_bytes == 0
    assert first.whole
    assert not second.whole


def test_writers_that_are_configured_alike_are_one_model(qwen):
    base = str(qwen / "base")
    config = writing(base, batch_size=2)
    assert len(local_models(config, jax.devices())) == 1
    assert [one.resident_bytes for one in verifier_programs(config, jax.devices())] in ([0], [0, 0])
    history = SearchConfig(
        model="m",
        sampling=SETTINGS,
        reflect=ReflectStage(history=2),
        reflector=config.reflector,
        refiner=config.refiner,
    )
    names = [one.name for one in verifier_programs(history, jax.devices())]
    assert names == ["reflector qwen texts", "refiner qwen texts"]


def test_published_models_are_known_by_name():
    seven = {"flops": 0.0}
    for name in (SEVEN_B, "Qwen/Qwen2.5-VL-3B-Instruct"):
        [program, *_] = verifier_programs(writing(name), jax.devices(), layers=1)
        assert seven["flops"] == 0 or program.flops < seven["flops"]
        seven["flops"] = program.flops
    for name, model, count in (
        ("nvila", "Efficient-Large-Model/NVILA-Lite-2B-Verifier", 2),
        ("reward", "someone/a-reward-model", 1),
    ):
        config = SearchConfig(model="m", sampling=SETTINGS, verifier=VERIFIERS.parse({"name": name, "model": model}))
        assert len(verifier_programs(config, jax.devices())) == count


def test_models_over_http_compile_nothing():
    assert verifier_programs(SearchConfig(model="m", sampling=SETTINGS), jax.devices()) == []
    assert verifier_programs(verifying("clip", "m"), jax.devices()) == []


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (writing("someone/else"), "model someone/else: no such folder"),
        (verifying("nvila", "someone/else"), "its sizes are not known"),
        (verifying("reward", "someone/else", base="someone/base"), "model someone/base"),
        (verifying("nvila", "Efficient-Large-Model/NVILA-Lite-2B-Verifier", devices=(8,)), "no device 8"),
    ],
)
def test_what_cannot_be_compiled_is_told(config, reason):
    with pytest.raises(InputError, match=reason):
        verifier_programs(config, jax.devices(), layers=1)


def test_a_checklist_is_compiled_for_what_it_is_given(qwen, monkeypatch):
    options = {"dtype": "float32", "batch_size": 2, "devices": (6, 7)}
    chat = QwenChat(QwenChatConfig(str(qwen / "base"), max_new_tokens=1, **options))
    [model] = local_models(verifying("checklist", str(qwen / "base"), **options), jax.devices())
    assert same_places(model.weights, chat._state)
    calls, [program] = given(monkeypatch, qwen_chat, "first_tokens"), model.programs
    wanted = inputs_of(taken(program), model.weights)
    assert program.name == "verifier checklist answers"
    assert program.flops > 0
    text = prompt_of(
        wanted[0][0][1], lambda text: bucket(len(chat._prepared(ChatQuery(None, (IMAGE, text)))[0].ids), LEAST_TOKENS)
    )
    [likely] = chat.first_tokens([ChatQuery(None, (IMAGE, text))], [3, 5])
    assert likely.shape == (2,)
    assert inputs_of(calls[0], model.weights) == wanted
