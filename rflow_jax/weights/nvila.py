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
from flax.typing import Dtype

from rflow_jax.errors import InputError
from rflow_jax.models.nvila import Nvila, NvilaConfig, abstract_nvila, require_nvila, require_projector
from rflow_jax.models.quantization import Quantization, quantize
from rflow_jax.models.qwen2.config import Qwen2Config
from rflow_jax.models.siglip import SiglipVisionConfig
from rflow_jax.tokenizers.nvila import NvilaTokenizer
from rflow_jax.utils.file_kinds import require_true_files
from rflow_jax.utils.images import levels_in
from rflow_jax.utils.json_files import check_types, naming, read_object
from rflow_jax.utils.progress import byte_progress
from rflow_jax.weights.convert import OnProgress, Options, byte_counter, open_folder
from rflow_jax.weights.flux import StoredNetwork
from rflow_jax.weights.hub import resolve
from rflow_jax.weights.key_mapping import KeyMapping
from rflow_jax.weights.loading import ShardingFor
from rflow_jax.weights.mappings import nvila, qwen
from rflow_jax.weights.model_folder import MODEL_FILE, save, write_model_file
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
        levels: float32 [256, 3]: each 8-bit pixel value as the tower gets it.
    """

    name: str
    config: NvilaConfig
    graph: nnx.GraphDef[Nvila]
    weights: nnx.State
    tokenizer: NvilaTokenizer
    levels: np.ndarray

    @property
    def network(self) -> Nvila:
        """The network with its weights."""
        return nnx.merge(self.graph, self.weights)


def load_nvila(
    model: str,
    *,
    dtype: Dtype = jnp.bfloat16,
    sharding_for: ShardingFor | None = None,
    quantization: Quantization | None = None,
    progress: bool = True,
) -> NvilaModel:
    """Reads a published checkpoint, or a folder that ``rflow convert nvila`` wrote, onto the devices.

    Args:
        model: a folder, or an id on the Hub.
        dtype: of parameters and activations.
        sharding_for: of each parameter; None puts all on the default device.
        quantization: of the language model's weights.

    Raises:
        InputError: no such folder, another network, or other tensors than this network's.
    """
    root = resolve(model, WANTED)
    config = read_nvila_config(root)
    tokenizer, levels = NvilaTokenizer(root / LANGUAGE, config.language), _levels(root, config)
    network = abstract_nvila(config, dtype)
    sources = {part: StoredNetwork.open(root / part) for part in PARTS}
    with byte_progress(progress) as bar:
        task = bar.add_task("loading", total=sum(source.nbytes for source in sources.values()))
        options = {"dtype": dtype, "sharding_for": sharding_for, "on_bytes": partial(bar.advance, task)}
        for part, source in sources.items():
            bar.update(task, description=f"loading {part}")
            source.load_with(_part(network, part), partial(_table, part, config), **options)
    quantize(network.language, quantization)
    return NvilaModel(model, config, *nnx.split(network), tokenizer, levels)


def read_nvila_config(root: Path) -> NvilaConfig:
    """The sizes in the configurations of a checkpoint; raises InputError, naming the file, for another network."""
    if missing := [part for part in ("", *PARTS) if not (root / part / "config.json").is_file()]:
        names = ", ".join(f"{part}/config.json".lstrip("/") for part in missing)
        raise InputError(f"{root}: has no {names}; an NVILA checkpoint holds {', '.join(PARTS)} and a config.json")
    require_true_files(root)
    content = _read(root / "config.json", require_nvila)
    _read(root / PROJECTOR / "config.json", require_projector)
    vision = _sizes(SiglipVisionConfig, root / TOWER / "config.json")
    language = _sizes(Qwen2Config, root / LANGUAGE / "config.json")
    with naming(root / "config.json"):
        return NvilaConfig.from_json(content, vision, language)


def convert_nvila(src: Path, dst: Path, options: Options = Options(), on_progress: OnProgress | None = None) -> None:
    """Converts a published checkpoint into a folder of ours, tensor by tensor; ``dst`` appears when it is complete.

    Raises:
        InputError: no such checkpoint, a tensor missing, unknown or of a wrong shape, ``dst`` exists, a full disk.
    """
    if (src / MODEL_FILE).is_file():
        raise InputError(f"{src}: is a converted model already")
    config = read_nvila_config(src)
    NvilaTokenizer(src / LANGUAGE, config.language)
    network = abstract_nvila(config)
    conversions: dict[str, Conversion] = {}
    for part in PARTS:
        files = open_folder(src / part, options.allow_pickle)
        table = _table(part, config, files)
        conversions[part] = Conversion.checked(table, _part(network, part), files, options.dtype)
    need_space(dst, sum(conversion.nbytes for conversion in conversions.values()))
    advance = byte_counter(on_progress, sum(conversion.files.nbytes for conversion in conversions.values()))
    with atomic_output(dst) as output:
        for part, conversion in conversions.items():
            (output / part).mkdir(parents=True)
            for file in (src / part).iterdir():
                if file.is_file() and file.suffix in _COPIED and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, output / part / file.name)
            save(conversion, output / part, options.storage, on_bytes=partial(advance, part))
        shutil.copyfile(src / "config.json", output / "config.json")
        write_model_file(output, options.storage, conversions, str(src))


def _part(network: Nvila, part: str) -> nnx.Module:
    return {TOWER: network.tower, PROJECTOR: network.projector, LANGUAGE: network.language}[part]


def _table(part: str, config: NvilaConfig, files: TensorFiles) -> KeyMapping:
    if part == TOWER:
        return nvila.siglip_mapping(files)
    return nvila.PROJECTOR if part == PROJECTOR else qwen.qwen2_mapping(head=not config.language.tie_word_embeddings)


def _levels(root: Path, config: NvilaConfig) -> np.ndarray:
    """The normalised pixel values of the tower; raises InputError for an unusable ``preprocessor_config.json``."""
    path = root / TOWER / "preprocessor_config.json"
    content, side = read_object(path), config.vision.image_size
    size = content.get("size")
    if size not in (side, {"height": side, "width": side}):
        raise InputError(f"{path}: size is {size!r}, the tower's images have {side} pixels a side")
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
