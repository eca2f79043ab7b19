"""The step of the tasks on a Qwen2.5-VL without its weights: what it takes is what the real one is given."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from rflow_jax.aot.program import abstract_state
from rflow_jax.aot.training import abstract_parts, qwen_training_programs
from rflow_jax.errors import InputError
from rflow_jax.models.qwen2_5_vl.model import abstract_qwen2_5_vl
from rflow_jax.parallel.mesh import MeshConfig, make_mesh
from rflow_jax.training.config import CommonConfig, OptimizerConfig
from rflow_jax.training.optimizers import make_optimizer
from rflow_jax.training.qwen.config import QwenLoraConfig
from tests.kit import chats as kit
from tests.kit.preferences import make_pairs
from tests.kit.reward import RewardRun, reward_config
from tests.kit.sft import SftRun, sft_config

MESH = MeshConfig(data=2, fsdp=2, tensor=2)


def taken(program):
    return [(aval.shape, aval.dtype) for aval in jax.tree.leaves(program.lower().in_avals)]


def given(tree):
    return [(np.shape(leaf), leaf.dtype) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("task", ["reward", "sft"])
def test_a_step_is_compiled_for_what_it_is_given(tmp_path, task):
    if task == "reward":
        run = RewardRun(reward_config(make_pairs(tmp_path, 8), mesh=MESH, train={"gradient_accumulation_steps": 2}), 8)
    else:
        run = SftRun(sft_config(kit.make_chats(tmp_path), mesh=MESH), 8)
    [program] = qwen_training_programs(run.task._config, run.mesh)
    batch = next(iter(run.task.open_loader(0, None)))
    assert taken(program) == given((run.state, run.task.exporter.parts.frozen, run.task.put(batch)))
    assert program.flops == run.task._config.train.batch_size * run.task.flops
    assert program.devices == 8
    assert program.resident_bytes > 0


def test_parameters_and_their_optimizers_numbers_lie_where_the_real_ones_do(tmp_path):
    prodigy = OptimizerConfig("prodigy")
    how = {"lora": QwenLoraConfig(rank=4), "trainable_parameters": r"vision\.merger\..*", "optimizer": prodigy}
    config = sft_config(kit.make_chats(tmp_path), mesh=MESH, **how)
    run = SftRun(config, 8)
    parts = run.task.exporter.parts
    model = abstract_qwen2_5_vl(run.task._maker.prepare.config, np.float32)
    shapes = abstract_parts(model, config, run.mesh)
    state, _ = abstract_state(shapes.trainable, make_optimizer(prodigy), run.mesh)
    for real, stand_in in ((run.state, state), (parts.frozen, shapes.frozen)):
        for array, shape in zip(jax.tree.leaves(real), jax.tree.leaves(stand_in), strict=True):
            assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
            assert array.sharding.is_equivalent_to(shape.sharding, array.ndim)
    assert dict(nnx.to_flat_state(parts.trainable)).keys() == dict(nnx.to_flat_state(shapes.trainable)).keys()


def test_what_cannot_be_compiled_is_told():
    mesh = make_mesh(MeshConfig(), jax.devices())
    with pytest.raises(InputError, match="multiple of 8"):
        qwen_training_programs(reward_config(Path("pairs.jsonl"), batch=4), mesh)
    with pytest.raises(InputError, match="task other"):
        qwen_training_programs(CommonConfig(task="other", model="m", out="o"), mesh)
