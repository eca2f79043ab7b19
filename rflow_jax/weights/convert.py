"""Converts PyTorch checkpoints into model folders of ours."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rflow_jax.errors import InputError
from rflow_jax.models.autoencoder import AutoencoderConfig
from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.qwen2_5_vl.model import abstract_qwen2_5_vl
from rflow_jax.tokenizers.flux import CLIP_TOKENIZER, T5_TOKENIZER
from rflow_jax.utils.file_kinds import require_true_files
from rflow_jax.utils.json_files import read_object
from rflow_jax.weights import published
from rflow_jax.weights.components import CLIP, COMPONENTS, T5, TRANSFORMER, VAE, Component
from rflow_jax.weights.flux import TRANSFORMER_CLASS, ModelPath, describe
from rflow_jax.weights.gguf_io import open_file
from rflow_jax.weights.key_mapping import KeyMapping
from rflow_jax.weights.mappings.flux import bfl_config, bfl_mapping
from rflow_jax.weights.mappings.qwen import qwen2_5_vl_mapping
from rflow_jax.weights.mappings.text_encoders import clip_sizes, is_clip_text, is_t5, t5_sizes
from rflow_jax.weights.model_folder import Storage, is_stored, save, write_json, write_model_file
from rflow_jax.weights.pytorch_files import is_pickle, open_pickle
from rflow_jax.weights.qwen import read_qwen_config
from rflow_jax.weights.reward_config import CONFIG_FILE
from rflow_jax.weights.safetensors_io import TensorFiles
from rflow_jax.weights.saving import Conversion, atomic_output, need_space

TOKENIZERS = (CLIP_TOKENIZER, T5_TOKENIZER)
COPIED = ("scheduler", *TOKENIZERS)  # of a diffusers folder

# Called with (network, bytes of the checkpoint done, bytes in all).
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CheckpointPart:
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
        allow_pickle: read PyTorch's ``.bin`` and ``.pth`` if there is no safetensors.
        ae: for single files: ``ae.safetensors``.
        text: for single files: files of the text encoders, and folders in diffusers' layout with these or tokenizers;
            a file goes before a folder's network, but takes what its weights don't say from the folder's configuration.
    """

    storage: Storage = "safetensors"
    dtype: Any = None
    allow_pickle: bool = False
    ae: Path | None = None
    text: Sequence[Path] = ()


def convert_flux(src: Path, dst: Path, options: Options = Options(), on_progress: OnProgress | None = None) -> None:
    """Converts a FLUX model (a diffusers folder or single files) into a folder of ours.

    Tensors are written as they are read, so memory holds a bounded window of them. ``dst`` appears when it is complete.

    Raises:
        InputError: no such model, a tensor missing, unknown or of a wrong shape, ``dst`` exists, a full disk.
    """
    found = describe(src)
    if found.kind == "converted":
        raise InputError(f"{src}: is a converted model already")
    conversions: dict[str, Conversion] = {}  # all are checked before anything is written
    sources = _sources(found, options)
    for source in sources:
        network = source.component.abstract(source.component.config.from_json(source.config))
        conversions[source.component.folder] = Conversion.checked(source.table, network, source.files, options.dtype)
    copied = _copied(found, options)
    need_space(dst, sum(conversion.nbytes for conversion in conversions.values()))
    advance = byte_counter(on_progress, sum(source.files.nbytes for source in sources))
    with atomic_output(dst) as output:
        for source in sources:
            name = source.component.folder
            (output / name).mkdir(parents=True)
            write_json(output / name / "config.json", source.config)
            save(conversions[name], output / name, options.storage, on_bytes=partial(advance, name))
        _write_rest(found, copied, output)
        write_model_file(output, options.storage, conversions, str(src))


def byte_counter(on_progress: OnProgress | None, total: int) -> Callable[[str, int], None]:
    """A function of (network, bytes of one tensor) that reports the bytes done so far."""
    done = 0

    def advance(name: str, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if on_progress:
            on_progress(name, done, total)

    return advance


def _sources(found: ModelPath, options: Options) -> list[CheckpointPart]:
    if found.kind == "diffusers":
        if options.ae or options.text:
            raise InputError(
                f"{found.path}: a diffusers folder holds its own autoencoder and text encoders: leave out ae and text"
            )
        present = [component for component in COMPONENTS if component.folder in found.components]
        return [_from_folder(component, found.components[component.folder], options) for component in present]
    file = found.components[TRANSFORMER.folder]
    files = open_file(file, allow_pickle=options.allow_pickle)
    sizes = bfl_config(files.shapes, str(file))
    config = {"_class_name": TRANSFORMER_CLASS} | asdict(sizes)
    sources = [CheckpointPart(TRANSFORMER, config, files, bfl_mapping(files))]
    ae = options.ae or found.components.get(VAE.folder)
    if ae is not None:
        files, vae_config = open_file(ae, allow_pickle=options.allow_pickle), AutoencoderConfig()
        config = {"_class_name": "AutoencoderKL"} | asdict(vae_config)
        sources.append(CheckpointPart(VAE, config, files, VAE.table_for(files, vae_config)))
    if options.text:
        sources += _text_encoders(options, sizes)
    return sources


def _text_encoders(options: Options, sizes: FluxConfig) -> list[CheckpointPart]:
    """CLIP and T5, from files told apart by their tensors, and from folders."""
    folders = [path for path in options.text if path.is_dir()]
    parts: dict[str, CheckpointPart] = {}
    for path in (path for path in options.text if path not in folders):
        part = _text_encoder(path, folders, sizes, options.allow_pickle)
        if (first := parts.setdefault(part.component.folder, part)) is not part:
            raise InputError(f"{path}: a {part.table.name}, as {first.files.source} is; give CLIP's file and T5's")
    for component in (CLIP, T5):
        if component.folder in parts:
            continue
        if (folder := next((f for f in folders if (f / component.folder).is_dir()), None)) is not None:
            parts[component.folder] = _from_folder(component, folder / component.folder, options)
    if missing := [component.folder for component in (CLIP, T5) if component.folder not in parts]:
        where = ", ".join(map(str, options.text))
        raise InputError(
            f"{where}: has no {', '.join(missing)}; expected a folder in diffusers' layout, or files such as "
            "clip_l.safetensors and t5xxl_fp16.safetensors"
        )
    return list(parts.values())


def _text_encoder(file: Path, folders: Sequence[Path], sizes: FluxConfig, allow_pickle: bool) -> CheckpointPart:
    """The text encoder in a file; its configuration is beside it, in a folder, or FLUX's with its tensors' sizes."""
    if not file.exists():
        raise InputError(f"{file}: no such file or folder")
    files = open_file(file, allow_pickle=allow_pickle)
    if is_clip_text(files.shapes):
        component, sizes_of, width, wanted = CLIP, clip_sizes, "hidden_size", sizes.pooled_projection_dim
    elif is_t5(files.shapes):
        component, sizes_of, width, wanted = T5, t5_sizes, "d_model", sizes.joint_attention_dim
    else:
        raise InputError(
            f"{file}: neither CLIP's text model nor T5's encoder; "
            "give files such as clip_l.safetensors and t5xxl_fp16.safetensors"
        )
    as_published = published.DEV[component.folder]
    for path in (file.with_name("config.json"), *(folder / component.folder / "config.json" for folder in folders)):
        if path.is_file() and (config := read_object(path)).get("model_type") == as_published["model_type"]:
            break
    else:
        config, path = as_published | sizes_of(files.shapes, str(file)), file
    table = component.table_for(files, component.config_of(config, path))
    if config[width] != wanted:
        raise InputError(f"{file}: a {table.name} of width {config[width]}; this transformer takes one of {wanted}")
    return CheckpointPart(component, config, files, table)


def _from_folder(component: Component, folder: Path, options: Options) -> CheckpointPart:
    config = read_object(folder / "config.json")
    files = open_folder(folder, options.allow_pickle)
    sizes = component.config_of(config, folder / "config.json")
    return CheckpointPart(component, config, files, component.table_for(files, sizes))


def open_folder(folder: Path, allow_pickle: bool) -> TensorFiles:
    """The tensors in a network's folder; PyTorch's own files only if there is no safetensors, and if allowed."""
    pickles = sorted(file for file in folder.glob("*") if is_pickle(file))
    if pickles and not any(folder.glob("*.safetensors")):
        return open_pickle(*pickles, allow=allow_pickle)
    return TensorFiles.open(folder)


def _copied(found: ModelPath, options: Options) -> list[Path]:
    """The folders that are copied: tokenizers, and a diffusers folder's scheduler.

    Raises:
        InputError: a file in one of them is only a pointer to it, or a web page.
    """
    roots = [found.path] if found.kind == "diffusers" else options.text
    names = COPIED if found.kind == "diffusers" else TOKENIZERS
    folders = [next((root / name for root in roots if (root / name).is_dir()), None) for name in names]
    present = [folder for folder in folders if folder is not None]
    for folder in present:
        require_true_files(folder)
    return present


def _write_rest(found: ModelPath, copied: Sequence[Path], dst: Path) -> None:
    """Copies folders; writes ``model_index.json`` and, for single files, the scheduler as published."""
    for folder in copied:
        shutil.copytree(folder, dst / folder.name)
    if found.kind == "diffusers":
        if found.info:
            write_json(dst / "model_index.json", found.info)
        return
    config = FluxConfig.from_json(read_object(dst / TRANSFORMER.folder / "config.json"))
    (dst / "scheduler").mkdir()
    # The schedule FLUX.1 was published with: dev's is shifted by the number of tokens, schnell's is not.
    schedule = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": config.guidance_embeds,
        "shift": 3.0 if config.guidance_embeds else 1.0,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    }
    write_json(dst / "scheduler" / "scheduler_config.json", schedule)
    if all((dst / component.folder).is_dir() for component in COMPONENTS):
        write_json(dst / "model_index.json", {"_class_name": "FluxPipeline"})


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
    table = qwen2_5_vl_mapping(files, head=model.language.head is not None)
    conversion = Conversion.checked(table, model, files, dtype)
    need_space(dst, conversion.nbytes)
    advance = partial(byte_counter(on_progress, files.nbytes), "qwen2_5_vl")
    with atomic_output(dst) as output:
        output.mkdir(parents=True, exist_ok=True)
        save(conversion, output, storage, on_bytes=advance)
        write_json(output / "config.json", read_object(src / "config.json"))
        for name in (name for name in _QWEN_FILES if (src / name).is_file()):
            shutil.copy(src / name, output / name)
        write_model_file(output, storage, (), str(src))
