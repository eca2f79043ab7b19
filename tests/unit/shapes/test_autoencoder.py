"""Training of the shapes world's autoencoder: tables of scenes, steps, resumed runs, and what is exported."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rflow_jax.errors import InputError
from rflow_jax.generation.pipeline import load_pipeline
from rflow_jax.parallel.layout import MeshConfig
from rflow_jax.parallel.mesh import make_mesh
from rflow_jax.shapes.autoencoder import Measurement, ShapesAutoencoder, decibels, shows
from rflow_jax.shapes.autoencoder_config import (
    AutoencoderLoopConfig,
    SceneDataConfig,
    SceneValidationConfig,
    ShapesAutoencoderRunConfig,
)
from rflow_jax.shapes.judge import read
from rflow_jax.shapes.model import new_network, save_pipeline, sizes, write_start
from rflow_jax.shapes.render import draw, pack
from rflow_jax.shapes.scene_table import CHUNK, make_table, sample_scene
from rflow_jax.shapes.scenes import MAX_ITEMS
from rflow_jax.training.config import CheckpointConfig, LoggingConfig, OptimizerConfig
from rflow_jax.training.loop import train
from rflow_jax.weights.components import VAE
from tests.kit.task_run import TaskRun

SMALL = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A model whose autoencoder is smaller still."""
    root = tmp_path_factory.mktemp("shapes")
    write_start(root / "start")
    vae = new_network(VAE, replace(sizes()["vae"], **SMALL), seed=0)
    change = {name: list(value) if isinstance(value, tuple) else value for name, value in SMALL.items()}
    save_pipeline(root / "small", {"vae": vae}, base=root / "start", changes={"vae": change})
    return root / "small"


def config_of(start: Path, out: Path | str = "unused", **how: Any) -> ShapesAutoencoderRunConfig:
    loop = {"steps": 4, "batch_size": 4, "dtype": "float32"} | how.pop("train", {})
    whole = {
        "data": SceneDataConfig(scenes=12, workers=0),
        "train": AutoencoderLoopConfig(**loop),
        "optimizer": OptimizerConfig("adamw", lr=5e-3, max_grad_norm=1.0, weight_decay=0.0, betas=(0.9, 0.99)),
        "validation": SceneValidationConfig(scenes=3, every=4),
        "checkpoint": CheckpointConfig(every=2, keep_last=2),
        "logging": LoggingConfig(tensorboard=False),
    }
    return ShapesAutoencoderRunConfig(model=str(start), out=str(out), **whole | how)


class Steps(TaskRun):
    """Tells losses and norms of the gradients."""

    def __init__(self, config: ShapesAutoencoderRunConfig, devices: int = 1):
        super().__init__(ShapesAutoencoder, config, devices, lambda report: ())


@pytest.fixture(scope="module")
def plain(start) -> Steps:
    return Steps(config_of(start))


@pytest.fixture(scope="module")
def losses(plain) -> np.ndarray:
    return plain.losses(12)


def test_a_table_depends_on_its_seed_alone():
    here = make_table(CHUNK + 3, 7, spoiled=0.3, workers=0)
    there = make_table(CHUNK + 3, 7, spoiled=0.3, workers=2)
    assert here.fingerprint == there.fingerprint
    few, others = (make_table(20, seed, spoiled=0.3) for seed in (7, 8))
    slots = few.items.shape[1]
    assert slots <= here.items.shape[1] < MAX_ITEMS
    np.testing.assert_array_equal(here.items[:20, :slots], few.items)
    np.testing.assert_array_equal(here.backgrounds[:20], few.backgrounds)
    assert few.fingerprint != others.fingerprint


def test_pictures_of_a_table_are_those_of_its_scenes():
    table = make_table(20, 0, spoiled=1.0)
    scenes = [sample_scene(0, number, 1.0) for number in (3, 11)]
    found = jax.jit(lambda table, indices: table.draw(indices))(table, jnp.asarray([3, 11]))
    np.testing.assert_allclose(found, draw(*pack(scenes)).astype(int), atol=1)


def test_the_loss_falls(losses):
    assert np.isfinite(losses).all()
    assert losses[-1, 0] < 0.7 * losses[0, 0]


def test_losses_and_gradients_on_a_mesh_are_those_of_one_device(start, losses):
    run = Steps(config_of(start, mesh=MeshConfig(data=2, fsdp=2)), 4)
    np.testing.assert_allclose(run.losses(2), losses[:2], rtol=1e-4)


def test_a_stopped_and_resumed_run_equals_a_whole_one(start, losses, tmp_path, monkeypatch):
    monkeypatch.setattr("rflow_jax.training.loop.make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    train(config_of(start, tmp_path, train={"steps": 2}))
    train(config_of(start, tmp_path, resume=True))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["drawn"] for line in steps] == [{"scenes": 4 * (k + 1)} for k in range(4)]
    found = [[line["loss"], line["gradient_norm"]] for line in steps]
    np.testing.assert_allclose(found, losses[:4], rtol=1e-6)
    assert {line["step"] for line in lines if "validation/psnr" in line} == {0, 2, 4}
    assert sorted(folder.name for folder in (tmp_path / "model").iterdir()) == ["2", "4"]
    check_export(tmp_path / "model" / "4")


def test_a_run_goes_on_with_its_own_scenes(plain):
    with plain.task.open_loader(0, None) as loader:
        position, batch = loader.position(3), next(iter(loader))
    with plain.task.open_loader(3, json.loads(json.dumps(position))) as loader:
        later = next(iter(loader))
    assert batch.numbers.tolist() == [0, 1, 2, 3]
    assert later.numbers.tolist() == [12, 13, 14, 15]
    assert batch.digest != later.digest
    with pytest.raises(InputError, match="not the records the run began with"):
        plain.task.open_loader(3, position | {"fingerprint": "another"})


def check_export(folder: Path) -> None:
    """An export is a whole model, whose latents have mean 0 and standard deviation 1, and are hardly drawn."""
    pipe = load_pipeline(str(folder), dtype="float32", progress=False)
    config = pipe.bundle.vae_config
    assert config.block_out_channels == SMALL["block_out_channels"]
    table = make_table(12, 0, spoiled=0.3)
    network = nnx.merge(pipe.bundle.graphs.vae, pipe.bundle.weights["vae"])
    mean, logvar = network.encode(jnp.asarray(draw(*table), jnp.float32) / 127.5 - 1)
    scaled = network.scale(mean)
    assert float(jnp.mean(scaled)) == pytest.approx(0, abs=1e-3)
    assert float(jnp.std(scaled)) == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(jnp.exp(0.5 * logvar), 0.01, rtol=1e-4)


def test_validation_reads_pictures_that_are_good_enough(plain, tmp_path):
    """Whatever the number of scenes, which fill no batch."""
    validation = plain.task.open_validation(tmp_path)
    assert validation is not None
    found = validation.run(0, plain.state.trainable)
    assert 0 < found["validation/psnr"] < 30
    assert found["validation/read"] == 0

    exact = draw(*pack(validation._scenes))
    measured = plain.task._measure(plain.state.trainable, validation._table)
    assert measured.pictures.shape == exact.shape
    as_decoded = np.mean((measured.pictures / 127.5 - exact / 127.5) ** 2)
    assert decibels(as_decoded, np) == pytest.approx(found["validation/psnr"], abs=1)
    validation._measure = lambda trainable, table: measured._replace(pictures=exact)
    assert validation.run(0, plain.state.trainable)["validation/read"] == 1


def test_no_validation_without_scenes(plain, start, tmp_path):
    validation = SceneValidationConfig(scenes=0)
    task = ShapesAutoencoder(config_of(start, validation=validation), plain.mesh)
    assert task.open_validation(tmp_path) is None
    assert isinstance(task._measure, Measurement)


def test_a_scene_is_shown_only_as_it_is():
    scene = sample_scene(0, 1, 0.0)
    one, *others = scene.items
    assert shows(scene, read(draw(*pack([scene]))[0]))
    moved, small = replace(one, x=one.x + 2), replace(one, half_size=one.half_size - 1.5)
    colored = replace(one, color="pink" if one.color != "pink" else "red")
    for items in (others, [moved, *others], [small, *others], [colored, *others], [one, one, *others]):
        assert not shows(scene, replace(scene, items=tuple(items)))
        assert not shows(replace(scene, items=tuple(items)), scene)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"train": {"remat": "full"}}, "train.remat is full"),
        ({"trainable_parameters": "decoder.*"}, "trainable_parameters: all of the autoencoder's"),
    ],
)
def test_settings_without_effect(start, how, message):
    with pytest.raises(InputError, match=message):
        config_of(start, **how)


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        (SceneDataConfig, {"scenes": 0}, "data.scenes is 0: give a whole number from 1"),
        (SceneDataConfig, {"spoiled": 1.5}, "data.spoiled is 1.5: give a number from 0 to 1"),
        (SceneValidationConfig, {"every": 0}, "validation.every is 0"),
    ],
)
def test_settings_that_cannot_be(section, value, message):
    with pytest.raises(InputError, match=message):
        section(**value)


def test_a_model_that_cannot_be_trained(plain, start, tmp_path):
    mesh = plain.mesh
    with pytest.raises(InputError, match="no such file or folder"):
        ShapesAutoencoder(config_of(tmp_path / "none"), mesh)
    shutil.copytree(start, tmp_path / "grey")
    file = tmp_path / "grey" / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"in_channels": 1}))
    with pytest.raises(InputError, match="an autoencoder of RGB without quant_conv"):
        ShapesAutoencoder(config_of(tmp_path / "grey"), mesh)
    shutil.rmtree(tmp_path / "grey" / "tokenizer")
    with pytest.raises(InputError, match="has no tokenizer"):
        ShapesAutoencoder(config_of(tmp_path / "grey"), mesh)
