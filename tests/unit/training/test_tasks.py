"""Which task a command line means, and the recipes of the tasks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rflow_jax.errors import InputError
from rflow_jax.training.config import DEFAULT_TASK, TASKS, CommonConfig, CorrectorRunConfig, config_class
from rflow_jax.training.reward.config import RewardRunConfig
from rflow_jax.training.run_folder import CONFIG, write_config
from rflow_jax.training.sft.config import SftRunConfig
from rflow_jax.utils import cli

ROOT = Path(__file__).parents[3]
RECIPES = sorted([*(ROOT / "configs").glob("reward_*.yaml"), *(ROOT / "configs").glob("sft_*.yaml")])
LIGHT = """
import sys
import rflow_jax.training.reward.loss, rflow_jax.training.sft.loss
from jax._src import xla_bridge
print(len(xla_bridge._backends), "torch" in sys.modules)
"""


def read(file: Path) -> CommonConfig:
    found: list[Any] = []
    config = config_class(cli.early_value(["--config", str(file)], "task", DEFAULT_TASK))
    cli.run_command(cli.Command((config,), found.append), ["--config", str(file)])
    return found[0]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_read_and_read_again_as_it_was_resolved(recipe, tmp_path):
    config = read(recipe)
    assert recipe.stem.startswith(config.task)
    write_config(tmp_path, asdict(config))
    assert read(tmp_path / CONFIG) == config
    assert recipe.read_text().startswith("# ")
    assert f"--config configs/{recipe.name}" in recipe.read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--optimizer=adamw", "optimizer: expected keys with values, got 'adamw'"),
        ("--mesh=4", "mesh: expected keys with values, got '4'"),
        ("--data.retry=5", "data.retry: expected keys with values, got '5'"),
        ("--data.retry=[1]", "data.retry: expected keys with values, got '[1]'"),
        ("--logging={every: x}", "logging.every is x: give a whole number"),
        ("--optimizer=null", "optimizer: expected keys with values, got 'null'"),
    ],
)
def test_a_word_where_a_section_belongs(argv, message):
    with pytest.raises(InputError) as caught:
        cli.run_command(cli.Command((CorrectorRunConfig,), print), ["--model=m", "--data.path=s", "--out=o", argv])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: null", "{file}: train is null: give keys with values, or leave it out"),
        ("optimizer: adamw", "optimizer: expected keys with values, got 'adamw'"),
        ("data: {path: s, retry: 5}", "{file}: data.retry is 5: give keys with values, or leave it out"),
    ],
)
def test_a_value_where_a_file_should_hold_a_section(tmp_path, text, message):
    (tmp_path / "wrong.yaml").write_text(text)
    argv = ["--data.path=s", "--config", str(tmp_path / "wrong.yaml"), "--model=m", "--out=o"]
    with pytest.raises(InputError) as caught:
        cli.run_command(cli.Command((CorrectorRunConfig,), print), argv)
    assert str(caught.value) == message.replace("{file}", str(tmp_path / "wrong.yaml"))


def test_the_task_of_a_command_line(tmp_path):
    for number, content in enumerate(("task: sft", "model: m", "- a list", ": no {yaml", "task: reward")):
        (tmp_path / f"{number}.yaml").write_text(content)
    files = [str(tmp_path / f"{number}.yaml") for number in range(5)]

    def task(*argv: str) -> str:
        return cli.early_value(argv, "task", DEFAULT_TASK)

    assert task() == "corrector"
    assert task("--config", files[0]) == "sft"
    assert task(f"--config={files[0]}", "--task", "reward") == "reward"
    assert task("--task=sft", "--config", files[4]) == "sft"
    assert task("--config", files[0], "--config", files[4]) == "reward"
    assert task("--config", files[4], "--config", files[1]) == "reward"
    for file in (files[2], "/nowhere.yaml"):
        assert task("--config", file) == "corrector"
    with pytest.raises(InputError, match=r"3\.yaml:1: not YAML"):
        task("--config", files[3])


def test_every_task_has_settings_of_its_own():
    found = {name: config_class(name) for name in TASKS}
    assert found.items() >= {"corrector": CorrectorRunConfig, "reward": RewardRunConfig, "sft": SftRunConfig}.items()
    assert {name: kind.__dataclass_fields__["task"].default for name, kind in found.items()} == {n: n for n in TASKS}
    with pytest.raises(InputError, match="did you mean reward"):
        config_class("rewrad")


def test_what_workers_import_takes_no_device():
    """Else every worker would take the accelerator, or its memory."""
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False"]
