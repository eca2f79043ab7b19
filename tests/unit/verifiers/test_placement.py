"""Models with devices of their own, and weights in 8 bits: where they lie, and that the numbers stay."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import qwix
from flax import nnx
from PIL import Image

from rflow_jax.errors import InputError
from rflow_jax.models import attention
from rflow_jax.models.lora import linears
from rflow_jax.parallel.sharding import on_devices, on_mesh_of, pick, unclaimed
from rflow_jax.search import run as command
from rflow_jax.search.config import SearchConfig
from rflow_jax.verifiers.config import VERIFIERS, NvilaVerifierConfig, RewardVerifierConfig
from rflow_jax.verifiers.nvila import NvilaVerifier
from rflow_jax.verifiers.reward import RewardVerifier
from rflow_jax.vlm.config import QwenChatConfig
from rflow_jax.vlm.qwen_chat import ChatQuery, QwenChat
from rflow_jax.writers.base import QwenTextGeneratorConfig

PROMPTS = ("a photo of a bench", "two red apples")
ITEMS = [{"prompt": prompt} for prompt in PROMPTS]
SHAPES = ((90, 110), (64, 64))


@pytest.fixture(scope="module", autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def images():
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (*shape, 3), np.uint8)) for shape in SHAPES]


@pytest.fixture(scope="module")
def make(golden, tmp_path_factory):
    """kind, options -> a verifier of that kind."""
    root = tmp_path_factory.mktemp("placed")
    shutil.copytree(golden / "qwen", root / "qwen")
    checkpoint = str(golden / "nvila" / "checkpoint")

    def build(kind, **options):
        how = {"dtype": "float32", "batch_size": 2} | options
        if kind == "nvila":
            return NvilaVerifier(NvilaVerifierConfig(checkpoint, rank="margin", **how))
        return RewardVerifier(RewardVerifierConfig(str(root / "qwen" / "reward"), **how))

    return build


@pytest.fixture
def flash(monkeypatch):
    """Switches to the kernels of TPUs, which no compiler cuts; returns the shapes of their queries."""
    ran = []

    def switch():
        monkeypatch.setattr(attention, "_fastest", lambda q: ran.append(q.shape) or "flash")
        jax.clear_caches()
        return ran

    yield switch
    monkeypatch.undo()
    jax.clear_caches()


def scores(verifier, images):
    verdicts = verifier.score(images, ITEMS)
    assert not [verdict.error for verdict in verdicts if verdict.error]
    return np.array([verdict.score for verdict in verdicts])


def devices_of(verifier):
    state = verifier.model.weights if isinstance(verifier, NvilaVerifier) else verifier._state
    return {device for leaf in jax.tree.leaves(state) for device in leaf.devices()}


@pytest.mark.parametrize("kind", ["reward", "nvila"])
def test_scores_are_the_same_on_devices_of_its_own(make, images, kind):
    """To the last bit on one device, to rounding where heads and widths are cut over two."""
    want = scores(make(kind), images)
    alone = make(kind, devices=(3,))
    assert devices_of(alone) == {jax.devices()[3]}
    np.testing.assert_array_equal(scores(alone, images), want)
    for devices in ((4, 5), (1, 2, 6, 7)):
        cut = make(kind, devices=devices)
        assert devices_of(cut) == {jax.devices()[number] for number in devices}
        np.testing.assert_allclose(scores(cut, images), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["reward", "nvila"])
def test_scores_are_the_same_by_the_kernels_of_tpus(make, images, kind, flash):
    want = scores(make(kind), images)
    ran = flash()
    for devices in ((4, 5), (1, 2, 6, 7)):
        ran.clear()
        np.testing.assert_allclose(scores(make(kind, devices=devices), images), want, rtol=1e-5, atol=1e-5)
        assert ran, devices


def test_answers_are_the_same_by_the_kernels_of_tpus(golden, images, flash):
    config = QwenChatConfig(str(golden / "qwen" / "base"), dtype="float32", batch_size=2, max_new_tokens=6)
    questions = [ChatQuery(None, (image, prompt)) for image, prompt in zip(images, PROMPTS, strict=True)]
    want = QwenChat(config).answer(questions)
    ran = flash()
    assert QwenChat(replace(config, devices=(1, 2, 6, 7))).answer(questions) == want
    assert ran


def test_an_adapter_kept_apart_goes_along(make, images):
    want = scores(make("reward"), images)
    cut = make("reward", devices=(6, 7), merge_lora=False)
    assert devices_of(cut) == set(jax.devices()[6:8])
    np.testing.assert_allclose(scores(cut, images), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_scores_in_8_bits_are_those_of_the_rounded_weights(make, images, quantization):
    plain = scores(make("reward"), images)
    verifier = make("reward", quantization=quantization)
    got = scores(verifier, images)
    assert not np.array_equal(got, plain)
    model = nnx.merge(verifier._graph, verifier._state)
    for path, linear in linears(model).items():
        assert isinstance(linear.kernel.get_value(), qwix.QArray) == path.startswith("language.")
        if path.startswith("language."):
            linear.kernel.set_value(qwix.dequantize(linear.kernel.get_value()))
    verifier._graph, verifier._state = nnx.split(model)
    np.testing.assert_allclose(got, scores(verifier, images), rtol=1e-5, atol=1e-5)


def test_nvila_in_8_bits_scores_nearly_as_before(make, images):
    want = scores(make("nvila"), images)
    got = scores(make("nvila", quantization="int8"), images)
    assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_answers_are_the_same_on_devices_of_its_own(golden, images):
    config = {"dtype": "float32", "batch_size": 2, "max_new_tokens": 6}
    questions = [ChatQuery(None, (image, prompt)) for image, prompt in zip(images, PROMPTS, strict=True)]
    base = str(golden / "qwen" / "base")
    want = QwenChat(QwenChatConfig(base, **config)).answer(questions)
    for devices in ((2,), (1, 2), (0, 3, 4, 7)):
        assert QwenChat(QwenChatConfig(base, **config, devices=devices)).answer(questions) == want
    assert all(
        isinstance(answer, str)
        for answer in QwenChat(QwenChatConfig(base, **config, quantization="int8")).answer(questions)
    )


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ((8,), "no device 8: this process has 8"),
        ((0, 0), "each device once"),
        ((), "at least one"),
        ((-1,), "no device -1"),
    ],
)
def test_devices_that_do_not_exist_are_told(numbers, reason):
    with pytest.raises(InputError, match=reason):
        on_devices(numbers)


def test_no_devices_of_its_own_is_the_default():
    assert on_devices(None) is None
    assert pick([1, 0]) == [jax.devices()[1], jax.devices()[0]]


def put_on(numbers, kernel):
    place = on_devices(numbers)
    assert place is not None
    return jax.device_put(kernel, place("a.kernel", kernel.shape))


def test_a_program_is_traced_on_the_mesh_of_its_parameters():
    axes = []
    program = jax.jit(lambda x: axes.append(jax.sharding.get_abstract_mesh().axis_sizes) or x)
    one, two = (put_on(numbers, np.ones((8, 8))) for numbers in ((1,), (2, 3)))
    program(two)
    with on_mesh_of({"a": two}):
        program(two)
    assert axes == [(), (2,)]  # the mesh is part of what a compiled program is found by
    with on_mesh_of({"a": one}):
        assert jax.sharding.get_abstract_mesh().empty
    assert jax.sharding.get_abstract_mesh().empty


def test_the_generator_takes_what_is_left():
    assert unclaimed([[1], [2, 3]]) == [jax.devices()[k] for k in (0, 4, 5, 6, 7)]
    assert unclaimed([]) == jax.devices()
    assert unclaimed([range(8)]) == jax.devices()


def test_claims_of_an_ensemble_and_of_a_users_class_are_found():
    own = {"name": "package.module:Class", "options": {"devices": [1, 3]}}
    members = [{"name": "nvila", "devices": [2]}, {"name": "clip"}, {"name": "reward", "model": "m"}, own]
    assert VERIFIERS.parse({"name": "ensemble", "members": members}).claimed_devices == ((2,), [1, 3])
    for other in (None, 2, "01", ["0"], [True], {"a": 1}, []):
        assert VERIFIERS.parse(own | {"options": {"devices": other}}).claimed_devices == ()


@pytest.mark.parametrize(
    ("devices", "left"),
    [([1, 2, 3, 4, 5, 6, 7], None), ([0], [1, 2, 3, 4, 5, 6, 7]), ([0, 1, 2, 3, 4, 5, 6], [7])],
)
def test_a_search_generates_on_the_devices_that_no_model_took(monkeypatch, devices, left):
    seen = SimpleNamespace(mesh=None)
    monkeypatch.setattr(
        "rflow_jax.generation.pipeline.load_pipeline", lambda *_, mesh, **__: setattr(seen, "mesh", mesh)
    )
    verifier = NvilaVerifierConfig(devices=tuple(devices))
    command._load("noise", SearchConfig(model="nowhere", verifier=verifier))
    found = None if seen.mesh is None else sorted(device.id for device in seen.mesh.devices.flat)
    assert found == left


@pytest.mark.parametrize(("kind", "left"), [("noise", [0, 1, 3]), ("noise-prompt", [0, 1]), ("reflect", [0])])
def test_the_generator_takes_the_devices_of_roles_that_a_search_does_not_have(kind, left, monkeypatch):
    monkeypatch.setattr("rflow_jax.generation.pipeline.load_pipeline", lambda model, **given: given["mesh"])
    config = SearchConfig(
        model="m",
        verifier=NvilaVerifierConfig("v", devices=(2, 4, 5, 6, 7)),
        reflector=QwenTextGeneratorConfig("w", devices=(1,)),
        refiner=QwenTextGeneratorConfig("w", devices=(3,)),
    )
    mesh = command._load(kind, config)
    used = jax.devices()[:1] if mesh is None else mesh.devices.flatten().tolist()
    assert used == [jax.devices()[number] for number in left]
