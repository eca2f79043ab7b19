"""What a path holds: a model of ours, one in diffusers' layout, or Black Forest Labs' single files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rflow_jax.errors import InputError
from rflow_jax.weights.components import COMPONENTS, TRANSFORMER, read_object
from rflow_jax.weights.files import TensorFiles
from rflow_jax.weights.names.flux import is_bfl
from rflow_jax.weights.pickles import is_pickle
from rflow_jax.weights.save import FORMAT, MODEL_FILE, VERSION
from rflow_jax.weights.writing import PARTIAL

Kind = Literal["converted", "diffusers", "bfl"]
EXPECTED = (
    f"expected a converted folder ({MODEL_FILE}), a folder in diffusers' layout (model_index.json) "
    "or a single file of Black Forest Labs (flux1-dev.safetensors)"
)
TRANSFORMER_CLASS = "FluxTransformer2DModel"


@dataclass(frozen=True)
class ModelPath:
    """A model that was found.

    Attributes:
        components: subfolder's name -> where that network lies (a folder, or a single file).
        info: content of ``rflow_model.json`` or ``model_index.json``.
    """

    kind: Kind
    path: Path
    components: dict[str, Path]
    info: dict[str, Any] = field(default_factory=dict)


def describe(path: Path) -> ModelPath:
    """Says what kind of model lies at ``path``.

    Raises:
        InputError: nothing there, no model, an interrupted conversion, or one of a newer version.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; {EXPECTED}")
    if path.name.endswith(PARTIAL):
        raise InputError(f"{path}: a conversion that was interrupted; convert again")
    if path.is_file():
        return _single_file(path)
    if (path / MODEL_FILE).is_file():
        return _converted(path)
    if (path / "model_index.json").is_file():
        info = read_object(path / "model_index.json")
        found = {c.folder: path / c.folder for c in COMPONENTS if (path / c.folder / "config.json").is_file()}
        if TRANSFORMER.folder not in found:
            raise InputError(f"{path}: has a model_index.json but no transformer/config.json; fetch the whole folder")
        return ModelPath("diffusers", path, found, info)
    if _is_transformer(path):
        return ModelPath("diffusers", path, {TRANSFORMER.folder: path})
    single = sorted(path.glob("flux1-*.safetensors"))
    if len(single) == 1:
        ae = {"vae": path / "ae.safetensors"} if (path / "ae.safetensors").is_file() else {}
        return ModelPath("bfl", path, {TRANSFORMER.folder: single[0]} | ae)
    raise InputError(f"{path}: is no model: {EXPECTED}")


def _single_file(path: Path) -> ModelPath:
    # What a pickle holds is not looked at before it is known to be wanted.
    if not is_pickle(path) and not is_bfl(TensorFiles.open(path)):
        raise InputError(f"{path}: is no FLUX transformer: {EXPECTED}")
    return ModelPath("bfl", path, {TRANSFORMER.folder: path})


def _converted(path: Path) -> ModelPath:
    info = read_object(path / MODEL_FILE)
    if info.get("format") != FORMAT:
        raise InputError(f"{path / MODEL_FILE}: not written by convert_weights")
    if info.get("version") != VERSION:
        raise InputError(f"{path}: format version {info.get('version')}, this program reads {VERSION}; convert again")
    return ModelPath("converted", path, {name: path / name for name in info.get("components", ())}, info)


def _is_transformer(path: Path) -> bool:
    config = path / "config.json"
    return config.is_file() and read_object(config).get("_class_name") == TRANSFORMER_CLASS
