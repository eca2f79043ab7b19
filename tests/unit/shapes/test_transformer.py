"""Training of the shapes world's transformer: what a batch holds, steps, and what is exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rflow_jax.errors import InputError
from rflow_jax.generation.pipeline import load_pipeline
from rflow_jax.shapes.model import new_network, save_pipeline, sizes, write_start
from rflow_jax.shapes.transformer import ShapesTransformer, draw_batch, draw_conditions
from rflow_jax.shapes.transformer_config import (
    FlowConfig,
    PictureDataConfig,
    PromptValidationConfig,
    ShapesTransformerRunConfig,
)
from rflow_jax.training.config import LoopConfig, OptimizerConfig
from rflow_jax.training.corrector.step import sample_keys
from rflow_jax.weights.components import TRANSFORMER
from tests.kit.task_run import TaskRun

SMALL = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A model whose transformer is smaller still."""
    root = tmp_path_factory.mktemp("shapes")
    write_start(root / "start")
    network = new_network(TRANSFORMER, replace(sizes()["transformer"], **SMALL), seed=0)
    change = {name: list(value) if isinstance(value, tuple) else value for name, value in SMALL.items()}
    save_pipeline(root / "small", {"transformer": network}, base=root / "start", changes={"transformer": change})
    return root / "small"


def config_of(start: Path, **how: Any) -> ShapesTransformerRunConfig:
    whole = {
        "data": PictureDataConfig(pictures=8, workers=0),
        "train": LoopConfig(steps=8, batch_size=8, dtype="float32", remat="none"),
        "optimizer": OptimizerConfig("muon", lr=1e-2, max_grad_norm=1.0, weight_decay=0.0),
        "validation": PromptValidationConfig(prompts=2, every=8, num_inference_steps=1),
        "flow": FlowConfig(conditions=0.5),
    }
    return ShapesTransformerRunConfig(model=str(start), out="unused", **whole | how)


@pytest.fixture(scope="module")
def run(start) -> TaskRun:
    return TaskRun(ShapesTransformer, config_of(start), 1, lambda report: ())


def test_the_loss_falls_and_the_export_is_a_whole_model(run, tmp_path):
    losses = run.losses(12)
    assert np.isfinite(losses).all()
    assert losses[-3:, 0].mean() < 0.95 * losses[:3, 0].mean()
    run.task.exporter.export(run.state.trainable, tmp_path / "model")
    pipe = load_pipeline(str(tmp_path / "model"), dtype="float32", progress=False)
    assert pipe.bundle.flux_config.num_single_layers == SMALL["num_single_layers"]
    trained = [np.asarray(x) for x in jax.tree.leaves(run.state.trainable)]
    found = [np.asarray(x) for x in jax.tree.leaves(pipe.bundle.weights["transformer"][0])]
    assert all(np.array_equal(a, b) for a, b in zip(trained, found, strict=True))


def test_validation_judges_an_image_of_each_held_out_prompt(run, tmp_path):
    validation = run.task.open_validation(tmp_path)
    assert validation is not None
    found = validation.run(0, run.state.trainable)
    assert found["validation/all"] == 0
    assert len(found) >= 2


def test_a_batch_depends_on_its_numbers_alone(run):
    pictures, flow = run.task._pictures, FlowConfig()
    keys = sample_keys(3, jnp.arange(64, dtype=jnp.uint32))
    whole, part = draw_batch(pictures, keys, flow), draw_batch(pictures, keys[10:20], flow)
    for a, b in zip(whole, part, strict=True):
        if a is not None:
            np.testing.assert_array_equal(a[10:20], b)
    texts = {name: np.asarray(getattr(pictures, name)) for name in ("plain", "reflected")}
    for row, ids in zip(np.asarray(whole.rows), np.asarray(whole.t5), strict=True):
        known = [texts["plain"][row], texts["reflected"][row], np.asarray(pictures.empty)]
        assert any(np.array_equal(ids, one) for one in known)


def test_a_condition_is_the_picture_where_it_says_keep(run):
    pictures, flow = run.task._pictures, FlowConfig()
    keys = sample_keys(5, jnp.arange(64, dtype=jnp.uint32))
    batch = draw_batch(pictures, keys, flow)
    seen = draw_conditions(pictures, keys[:48], batch, flow)
    assert seen.condition is not None
    keep = [np.array_equal(ids, pictures.keep[row]) for ids, row in zip(seen.t5, seen.rows, strict=True)]
    same = [np.array_equal(c, pictures.latents[row]) for c, row in zip(seen.condition, seen.rows, strict=True)]
    assert 10 < sum(keep) < 38
    assert all(is_same for is_same, told in zip(same, keep, strict=True) if told)
    assert not all(same)


@pytest.mark.parametrize(
    ("how", "message"),
    [({"trainable_parameters": "x"}, "trainable_parameters: all of the transformer's")],
)
def test_settings_without_effect(start, how, message):
    with pytest.raises(InputError, match=message):
        config_of(start, **how)


def test_settings_that_cannot_be():
    with pytest.raises(InputError, match=r"flow\.conditions is 2: give a number from 0 to 1"):
        FlowConfig(conditions=2)
    with pytest.raises(InputError, match=r"data\.pictures is 1"):
        PictureDataConfig(pictures=1)
