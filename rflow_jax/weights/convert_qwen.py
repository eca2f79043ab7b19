"""Qwen2.5-VL of Transformers -> a folder of ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rflow_jax.errors import InputError
from rflow_jax.models.qwen2_5_vl.model import abstract_qwen2_5_vl
from rflow_jax.weights.components import read_object
from rflow_jax.weights.conversion import Conversion
from rflow_jax.weights.convert import OnProgress
from rflow_jax.weights.files import TensorFiles
from rflow_jax.weights.load import parameter_shapes
from rflow_jax.weights.names.qwen2_5_vl import table_for
from rflow_jax.weights.qwen import read_qwen_config
from rflow_jax.weights.reward.config import CONFIG_FILE
from rflow_jax.weights.save import Storage, save, write_model_file
from rflow_jax.weights.stored import is_stored
from rflow_jax.weights.tables import plan
from rflow_jax.weights.writing import need_space, whole

COPIED = (
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
    the_plan = plan(table_for(files, head=model.language.head is not None), parameter_shapes(model))
    the_plan.check_files(files)
    conversion = Conversion(the_plan, files, dtype)
    need_space(dst, sum(leaf.nbytes for leaf in conversion.leaves()))
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if on_progress:
            on_progress("qwen2_5_vl", done, files.nbytes)

    with whole(dst) as partial:
        partial.mkdir(parents=True, exist_ok=True)
        save(conversion, partial, storage, on_bytes=advance)
        config = read_object(src / "config.json")
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in (name for name in COPIED if (src / name).is_file()):
            shutil.copy(src / name, partial / name)
        write_model_file(partial, storage, (), str(src))
