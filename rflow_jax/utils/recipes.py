"""The recipes of this project (``configs/``), which are found by their names anywhere."""

from __future__ import annotations

from pathlib import Path

from rflow_jax.errors import InputError
from rflow_jax.utils.checks import nearest

_PACKAGE = Path(__file__).parents[1]
# A wheel carries them inside the package; in a checkout they lie beside it.
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


def find_recipe(name: str) -> str:
    """The file of a recipe: a path, or the name of one of ours with or without its suffix.

    Raises:
        InputError: there is no such file and no such recipe; names the nearest.
    """
    if not name:
        raise InputError("config is empty: name a YAML file or a recipe, which rflow configs lists")
    if Path(name).is_file() or "/" in name:
        return name
    for file in (CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if file.is_file():
            return str(file)
    known = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
    raise InputError(f"config {name}: no such file and no recipe of this name; did you mean {nearest(name, known)}?")


def find_prompts(name: str) -> str:
    """The file of prompts: a path, or the name of a file that comes along, such as ``prompts_debug``."""
    ours = CONFIGS / (name if name.endswith(".jsonl") else f"{name}.jsonl")
    return str(ours) if not Path(name).is_file() and "/" not in name and ours.is_file() else name
