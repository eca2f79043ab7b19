"""Checkpoints of PyTorch -> our model folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rflow_jax.errors import InputError
from rflow_jax.models.autoencoder import AutoencoderConfig
from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.qwen2_5_vl.model import abstract_qwen2_5_vl
from rflow_jax.utils.json_files import read_object
from rflow_jax.weights.components import CLIP, COMPONENTS, T5, TRANSFORMER, VAE, Component
from rflow_jax.weights.flux import TRANSFORMER_CLASS, ModelPath, describe
from rflow_jax.weights.key_mapping import KeyMapping, plan
from rflow_jax.weights.loading import parameter_shapes
from rflow_jax.weights.mappings.flux import bfl_config, bfl_mapping
from rflow_jax.weights.mappings.qwen import qwen2_5_vl_mapping
from rflow_jax.weights.model_folder import Storage, is_stored, save, write_model_file
from rflow_jax.weights.qwen import read_qwen_config
from rflow_jax.weights.reward import CONFIG_FILE
from rflow_jax.weights.safetensors_io import TensorFiles, is_pickle, open_pickle
from rflow_jax.weights.saving import Conversion, atomic_output, need_space

COPIED = ("scheduler", "tokenizer", "tokenizer_2")
TEXT = (CLIP.folder, T5.folder, "tokenizer", "tokenizer_2")

# Progress: told (network, bytes of the checkpoint done, bytes in all).
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Source:
    """One network of a checkpoint.

    Attributes:
        config: the content of its ``config.json``.
    """

    component: Component
    config: dict[str, Any]
    files: TensorFiles
    table: KeyMapping


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        storage: ``safetensors`` or ``orbax``.
        dtype: of all parameters; None keeps each tensor's.
        allow_pickle: read PyTorch's ``.bin`` and ``.pth`` where there is no safetensors.
        ae, text: for single files: ``ae.safetensors``, and a folder in diffusers' layout with the text
            encoders and tokenizers.
    """

    storage: Storage = "safetensors"
    dtype: Any = None
    allow_pickle: bool = False
    ae: Path | None = None
    text: Path | None = None


def convert_flux(src: Path, dst: Path, options: Options = Options(), on_progress: OnProgress | None = None) -> None:
    """Converts a FLUX model (a diffusers folder or single files) into a folder of ours.

    Tensors are written as they are read, so memory holds a bounded window of them. ``dst`` is there when all
    of it is, and not before.

    Raises:
        InputError: no such model, a tensor missing, unknown or of a wrong shape, ``dst`` exists, a full disk.
    """
    found = describe(src)
    if found.kind == "converted":
        raise InputError(f"{src}: is a converted model already")
    sources = _sources(found, options)
    plans = {source.component.folder: _planned(source, options) for source in sources}
    size = sum(leaf.nbytes for conversion in plans.values() for leaf in conversion.leaves())
    need_space(dst, size)
    total, done = sum(source.files.nbytes for source in sources), 0
    with atomic_output(dst) as partial:
        for source in sources:
            name = source.component.folder
            (partial / name).mkdir(parents=True)
            _write_json(partial / name / "config.json", source.config)

            def advance(nbytes: int, name: str = name) -> None:
                nonlocal done
                done += nbytes
                if on_progress:
                    on_progress(name, done, total)

            save(plans[name], partial / name, options.storage, on_bytes=advance)
        _copy_rest(found, options, partial)
        write_model_file(partial, options.storage, plans, str(src))


def _planned(source: Source, options: Options) -> Conversion:
    """Checks a checkpoint against its network, before anything is written."""
    config = source.component.config.from_json(source.config)
    the_plan = plan(source.table, parameter_shapes(source.component.abstract(config)))
    the_plan.check_files(source.files)
    return Conversion(the_plan, source.files, options.dtype)


def _sources(found: ModelPath, options: Options) -> list[Source]:
    if found.kind == "diffusers":
        if options.ae or options.text:
            raise InputError(
                f"{found.path}: a diffusers folder holds its own autoencoder and text encoders: leave out ae and text"
            )
        return [
            _from_folder(c, found.components[c.folder], options) for c in COMPONENTS if c.folder in found.components
        ]
    sources = [_bfl_transformer(found.components[TRANSFORMER.folder], options)]
    ae = options.ae or found.components.get(VAE.folder)
    if ae is not None:
        sources.append(_bfl_autoencoder(ae, options))
    if options.text is not None:
        if missing := [name for name in TEXT if not (options.text / name).is_dir()]:
            raise InputError(f"{options.text}: has no {', '.join(missing)}; expected a folder in diffusers' layout")
        sources += [_from_folder(c, options.text / c.folder, options) for c in (CLIP, T5)]
    return sources


def _from_folder(component: Component, folder: Path, options: Options) -> Source:
    config = read_object(folder / "config.json")
    files = open_folder(folder, options.allow_pickle)
    return Source(
        component, config, files, component.table_for(files, component.config_of(config, folder / "config.json"))
    )


def _bfl_transformer(file: Path, options: Options) -> Source:
    files = _open_file(file, options.allow_pickle)
    config = asdict(bfl_config(files.shapes, str(file)))
    return Source(TRANSFORMER, {"_class_name": TRANSFORMER_CLASS} | config, files, bfl_mapping(files))


def _bfl_autoencoder(file: Path, options: Options) -> Source:
    files = _open_file(file, options.allow_pickle)
    config = AutoencoderConfig()
    table = VAE.table_for(files, config)
    return Source(VAE, {"_class_name": "AutoencoderKL"} | asdict(config), files, table)


def _open_file(file: Path, allow_pickle: bool) -> TensorFiles:
    return open_pickle(file, allow=allow_pickle) if is_pickle(file) else TensorFiles.open(file)


def open_folder(folder: Path, allow_pickle: bool) -> TensorFiles:
    """The tensors in a network's folder; PyTorch's own files only where there is no safetensors, and if allowed."""
    pickles = sorted(file for file in folder.glob("*") if is_pickle(file))
    if pickles and not any(folder.glob("*.safetensors")):
        return open_pickle(*pickles, allow=allow_pickle)
    return TensorFiles.open(folder)


def _copy_rest(found: ModelPath, options: Options, dst: Path) -> None:
    """Tokenizers, scheduler and ``model_index.json``: copied, or for single files written as published."""
    root = found.path if found.kind == "diffusers" else options.text
    names = COPIED if found.kind == "diffusers" else TEXT
    for name in (name for name in names if name in COPIED):
        if root is not None and (root / name).is_dir():
            shutil.copytree(root / name, dst / name)
    if found.kind == "diffusers":
        if found.info:
            _write_json(dst / "model_index.json", found.info)
        return
    config = FluxConfig.from_json(read_object(dst / TRANSFORMER.folder / "config.json"))
    (dst / "scheduler").mkdir()
    _write_json(dst / "scheduler" / "scheduler_config.json", _scheduler(config))
    if all((dst / component.folder).is_dir() for component in COMPONENTS):
        _write_json(dst / "model_index.json", {"_class_name": "FluxPipeline"})


def _scheduler(config: FluxConfig) -> dict[str, Any]:
    """The schedule FLUX.1 was published with: dev's is shifted by the number of tokens, schnell's is not."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": config.guidance_embeds,
        "shift": 3.0 if config.guidance_embeds else 1.0,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


_QWEN_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def convert_qwen(
    src: Path, dst: Path, *, storage: Storage = "safetensors", dtype: Any = None, on_progress: OnProgress | None = None
) -> None:
    """Converts a folder of Transformers; tensors are written as they are read.

    Args:
        storage: ``safetensors`` or ``orbax``.
        dtype: of all parameters; None keeps each tensor's.

    Raises:
        InputError: no such model, a tensor missing, unknown or of a wrong shape, ``dst`` exists, a full disk.
    """
    if (src / CONFIG_FILE).is_file():
        raise InputError(f"{src}: a reward model, which is read as it is; only its base model can be converted")
    if is_stored(src):
        raise InputError(f"{src}: is a converted model already")
    model = abstract_qwen2_5_vl(read_qwen_config(src))
    files = TensorFiles.open(src)
    the_plan = plan(qwen2_5_vl_mapping(files, head=model.language.head is not None), parameter_shapes(model))
    the_plan.check_files(files)
    conversion = Conversion(the_plan, files, dtype)
    need_space(dst, sum(leaf.nbytes for leaf in conversion.leaves()))
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if on_progress:
            on_progress("qwen2_5_vl", done, files.nbytes)

    with atomic_output(dst) as partial:
        partial.mkdir(parents=True, exist_ok=True)
        save(conversion, partial, storage, on_bytes=advance)
        config = read_object(src / "config.json")
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in (name for name in _QWEN_FILES if (src / name).is_file()):
            shutil.copy(src / name, partial / name)
        write_model_file(partial, storage, (), str(src))
