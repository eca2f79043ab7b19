"""Numbers that are none in one image: it is an error with its cause, and all others are made as without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rflow_jax.commands.generate import GenerateConfig, generate
from rflow_jax.generation.config import SamplingConfig
from rflow_jax.generation.pipeline import NotFiniteError, Pending, Request, _runs, load_pipeline
from rflow_jax.generation.sampling import CHECKED, Sampled
from rflow_jax.utils.cli import run
from tests.kit.fake_pipeline import instead_of_loading

SETTINGS = SamplingConfig(
    height=32, width=32, condition_size=16, num_inference_steps=2, max_sequence_length=12, batch_size=2
)
PROMPTS = ["a cat", "two owls", "a red bench"]


@pytest.fixture(scope="module")
def pipe(golden):
    return load_pipeline(str(golden / "pipeline"), dtype="float32", progress=False)


@pytest.fixture(scope="module")
def images(pipe):
    return pipe.generate(PROMPTS, seeds=range(3), settings=SETTINGS)


def poisoned(pipe, network, number, key):
    """The pipeline with a number in the first floating-point parameter whose path has the key."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(pipe.bundle.weights[network])
    for place, (path, leaf) in enumerate(leaves):
        if key in jax.tree_util.keystr(path):
            values = [value for _, value in leaves]
            values[place] = leaf.at[(0,) * leaf.ndim].set(number)
            weights = pipe.bundle.weights | {network: jax.tree_util.tree_unflatten(tree, values)}
            return pipe.with_weights(weights)
    raise AssertionError([jax.tree_util.keystr(path) for path, _ in leaves])


@pytest.mark.parametrize(
    ("network", "number", "key", "cause"),
    [
        ("clip", np.nan, "final", CHECKED[0]),
        ("t5", np.inf, "final", CHECKED[0]),
        ("transformer", np.nan, "image_in", CHECKED[2]),
        ("vae", np.inf, "decoder", CHECKED[3]),
    ],
)
def test_the_cause_is_the_first_that_is_not_finite(pipe, network, number, key, cause):
    told = []
    with pytest.raises(NotFiniteError, match=f"3 of 3 images could not be made, such as number 1: {cause} became NaN"):
        poisoned(pipe, network, number, key).generate(
            PROMPTS, seeds=range(3), settings=SETTINGS, on_images=lambda *one: told.append(one)
        )
    assert told == []


def test_one_image_fails_alone(pipe, images, monkeypatch):
    """The encoding of one of three texts is not a number."""
    prompts = list(PROMPTS)

    def with_bad_text(*args):
        given = pipe.prepare(*args)
        bad = (args[2].clip_ids == owls).all(axis=1)
        return given._replace(pooled=jnp.where(bad[:, None], jnp.nan, given.pooled))

    owls = pipe.bundle.tokenizers.clip([prompts[1]], pipe.bundle.clip_length)[0]
    other = pipe.with_weights(pipe.bundle.weights)
    other.prepare = with_bad_text
    told = {}
    with pytest.raises(NotFiniteError) as found:
        other.generate(
            prompts,
            seeds=range(3),
            settings=SETTINGS,
            on_images=lambda first, made: told.update(enumerate(made, first)),
        )
    assert found.value.failed == {1: f"{CHECKED[0]} became NaN or infinite"}
    assert sorted(told) == [0, 2]
    for index, image in told.items():
        assert image.tobytes() == images[index].tobytes()
    first, second = other.start([Request(prompts[k], k) for k in (0, 1)], SETTINGS).images()
    assert first.tobytes() == images[0].tobytes()
    assert second == found.value.failed[1]


@pytest.mark.parametrize("row", range(4))
def test_each_check_is_told_by_its_name(row):
    finite = np.ones((2, 4), bool)
    finite[1, row:] = False
    pixels = jnp.full((2, 2, 2, 3), 7, jnp.uint8)
    first, second = Pending(2, Sampled(jnp.zeros(0), pixels, jnp.asarray(finite))).images()
    assert isinstance(first, Image.Image)
    assert second == f"{CHECKED[row]} became NaN or infinite"
    (alone,) = Pending(1, Sampled(jnp.zeros(0), pixels, jnp.asarray(finite))).images()
    assert isinstance(alone, Image.Image)


def test_runs_between_failed_images():
    a, b, c = (Image.new("RGB", (1, 1)) for _ in range(3))
    assert list(_runs([a, "x", b, c], 5)) == [(5, [a]), (7, [b, c])]
    assert list(_runs(["x", "y"], 0)) == []
    assert list(_runs([a, b], 3)) == [(3, [a, b])]
    assert list(_runs([], 0)) == []


def test_generate_writes_the_others_and_says_which(tmp_path, monkeypatch, capsys):
    fake = instead_of_loading(monkeypatch)
    fake.fails = lambda request: "its pixels became NaN or infinite" if request.seed == 1 else None
    config = GenerateConfig("m", "a cat", str(tmp_path), num_images=3)
    assert run(lambda: generate(config)) == 1
    said = capsys.readouterr().err
    assert "1 of 3 images could not be made, such as number 2: its pixels became NaN or infinite" in said
    assert sorted(path.name for path in tmp_path.glob("*")) == [
        f"seed_{seed}.{kind}" for seed in (0, 2) for kind in ("json", "png")
    ]
