"""Reads NVILA's checkpoints (VILA's layout: ``llm``, ``vision_tower``, ``mm_projector``) and converts them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from rflow_jax.errors import InputError
from rflow_jax.models.nvila import Nvila, NvilaConfig, abstract_nvila, require_nvila, require_projector
from rflow_jax.models.quantization import Quantization, quantize
from rflow_jax.models.qwen2.config import Qwen2Config
from rflow_jax.models.siglip import SiglipVisionConfig
from rflow_jax.tokenizers.nvila import NvilaTokenizer
from rflow_jax.utils.images import levels_in
from rflow_jax.utils.json_files import check_types, naming, read_object
from rflow_jax.utils.progress import byte_progress
from rflow_jax.weights.convert import OnProgress, Options, open_folder
from rflow_jax.weights.hub import resolve
from rflow_jax.weights.key_mapping import KeyMapping, plan
from rflow_jax.weights.loading import ShardingFor, load_into, parameter_shapes
from rflow_jax.weights.mappings import nvila, qwen
from rflow_jax.weights.model_folder import MODEL_FILE, is_stored, load_stored, save, stored_bytes, write_model_file
from rflow_jax.weights.safetensors_io import TensorFiles
from rflow_jax.weights.saving import Conversion, atomic_output, need_space

TOWER, PROJECTOR, LANGUAGE = "vision_tower", "mm_projector", "llm"
PARTS = (TOWER, PROJECTOR, LANGUAGE)
WANTED = ["*.json", *(f"{part}/*" for part in PARTS)]
_COPIED = (".json", ".txt", ".model", ".jinja")  # configurations and the tokenizer


@dataclasses.dataclass(frozen=True)
class NvilaModel:
    """A loaded model.

    Attributes:
        name: what it was loaded from.
        graph, weights: the network and its parameters.
        levels: float32 [256, 3]: what the tower sees of each level of a picture.
    """

    name: str
    config: NvilaConfig
    graph: Any
    weights: Any
    tokenizer: NvilaTokenizer
    levels: np.ndarray

    @property
    def network(self) -> Nvila:
        """The network with its weights."""
        return nnx.merge(self.graph, self.weights)


def load_nvila(
    model: str,
    *,
    dtype: Any = jnp.bfloat16,
    sharding_for: ShardingFor | None = None,
    quantization: Quantization | None = None,
    progress: bool = True,
) -> NvilaModel:
    """Reads a published checkpoint, or a folder that ``convert_weights nvila`` wrote, onto the devices.

    Args:
        model: a folder, or an id on the Hub.
        dtype: of parameters and activations.
        sharding_for: where each parameter lives; None puts all on the default device.
        quantization: of the language model's weights.

    Raises:
        InputError: no such folder, another network, or tensors that are not exactly this network's.
    """
    root = resolve(model, WANTED)
    config = read_nvila_config(root)
    tokenizer, levels = NvilaTokenizer(root / LANGUAGE, config.language), _levels(root, config)
    network = abstract_nvila(config, dtype)
    places = {part: root / part for part in PARTS}
    sizes = (stored_bytes(place) if is_stored(place) else TensorFiles.open(place).nbytes for place in places.values())
    with byte_progress(progress) as bar:
        task = bar.add_task("loading", total=sum(sizes))
        for part, place in places.items():
            bar.update(task, description=f"loading {part}")
            how = {"dtype": dtype, "sharding_for": sharding_for, "on_bytes": partial(bar.advance, task)}
            if is_stored(place):
                load_stored(_part(network, part), place, **how)
            else:
                files = TensorFiles.open(place)
                load_into(_part(network, part), _table(part, files, config), files, **how)
    quantize(network.language, quantization)
    return NvilaModel(model, config, *nnx.split(network), tokenizer, levels)


def read_nvila_config(root: Path) -> NvilaConfig:
    """The sizes in the configurations of a checkpoint; raises InputError, naming the file, for another network."""
    if missing := [part for part in ("", *PARTS) if not (root / part / "config.json").is_file()]:
        names = ", ".join(f"{part}/config.json".lstrip("/") for part in missing)
        raise InputError(f"{root}: has no {names}; an NVILA checkpoint holds {', '.join(PARTS)} and a config.json")
    content = _read(root / "config.json", require_nvila)
    _read(root / PROJECTOR / "config.json", require_projector)
    vision = _sizes(SiglipVisionConfig, root / TOWER / "config.json")
    language = _sizes(Qwen2Config, root / LANGUAGE / "config.json")
    with naming(root / "config.json"):
        return NvilaConfig.from_json(content, vision, language)


def convert_nvila(src: Path, dst: Path, options: Options = Options(), on_progress: OnProgress | None = None) -> None:
    """Converts a published checkpoint into a folder of ours, tensor by tensor; ``dst`` is there when all of it is.

    Raises:
        InputError: no such checkpoint, a tensor missing, unknown or of a wrong shape, ``dst`` exists, a full disk.
    """
    if (src / MODEL_FILE).is_file():
        raise InputError(f"{src}: is a converted model already")
    config = read_nvila_config(src)
    NvilaTokenizer(src / LANGUAGE, config.language)
    network = abstract_nvila(config)
    conversions = {}
    for part in PARTS:
        files = open_folder(src / part, options.allow_pickle)
        the_plan = plan(_table(part, files, config), parameter_shapes(_part(network, part)))
        the_plan.check_files(files)
        conversions[part] = Conversion(the_plan, files, options.dtype)
    need_space(dst, sum(leaf.nbytes for conversion in conversions.values() for leaf in conversion.leaves()))
    total, done = sum(conversion.files.nbytes for conversion in conversions.values()), 0
    with atomic_output(dst) as partial:
        for part, conversion in conversions.items():

            def advance(nbytes: int, part: str = part) -> None:
                nonlocal done
                done += nbytes
                if on_progress:
                    on_progress(part, done, total)

            _copy_rest(src / part, partial / part)
            save(conversion, partial / part, options.storage, on_bytes=advance)
        shutil.copyfile(src / "config.json", partial / "config.json")
        write_model_file(partial, options.storage, conversions, str(src))


def _part(network: Nvila, part: str) -> nnx.Module:
    return {TOWER: network.tower, PROJECTOR: network.projector, LANGUAGE: network.language}[part]


def _table(part: str, files: TensorFiles, config: NvilaConfig) -> KeyMapping:
    if part == TOWER:
        return nvila.siglip_mapping(files)
    return nvila.PROJECTOR if part == PROJECTOR else qwen.qwen2_mapping(head=not config.language.tie_word_embeddings)


def _levels(root: Path, config: NvilaConfig) -> np.ndarray:
    """How the tower's pictures are normalised; raises InputError where that is not said or cannot be done."""
    path = root / TOWER / "preprocessor_config.json"
    content, side = read_object(path), config.vision.image_size
    size = content.get("size")
    if size not in (side, {"height": side, "width": side}):
        raise InputError(f"{path}: size is {size!r}, the tower's pictures have {side} pixels a side")
    return levels_in(content, str(path))


def _sizes(config: Any, path: Path) -> Any:
    content = read_object(path)
    check_types(config, content, path)
    with naming(path):
        return config.from_json(content)


def _read(path: Path, require: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    content = read_object(path)
    with naming(path):
        require(content)
    return content


def _copy_rest(src: Path, dst: Path) -> None:
    dst.mkdir(parents=True)
    for file in src.iterdir():
        if file.is_file() and file.suffix in _COPIED and not file.name.endswith(".index.json"):
            shutil.copyfile(file, dst / file.name)
