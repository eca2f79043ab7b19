"""Every recipe of a search is read as a whole, and names what a search needs."""

from pathlib import Path

import pytest
import yaml

from rflow_jax.search.config import RunConfig, SearchConfig
from rflow_jax.utils import cli

CONFIGS = Path(__file__).parents[3] / "configs"
RECIPES = [path for path in sorted(CONFIGS.glob("*.yaml")) if "noise" in yaml.safe_load(path.read_text())]


def test_the_recipes_are_there():
    names = {path.name for path in RECIPES}
    assert names >= {"debug.yaml", "flux_dev_gpt.yaml", "flux_dev_nvila.yaml", "flux_dev_reward.yaml"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read_and_fits(recipe):
    read = []
    command = cli.Command((SearchConfig, RunConfig), lambda *configs: read.append(configs))
    flags = [f"--config={recipe}", "--prompts=x", "--out=y"]
    cli.run_command(command, flags)
    ((config, _),) = read
    config.require_fit("reflect", given=False)
    images = config.strategy("reflect").images()
    assert images in (8, 32)
    head = recipe.read_text().split("\nmodel:")[0]
    assert all(word in head for word in ("Command:", "Hardware:", "Time:", "Result:"))
