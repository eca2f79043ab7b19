"""The folder of a run.

::

    config.yaml                     the resolved configuration, as the newest start had it
    metrics.jsonl                   one line of numbers every so many steps
    tensorboard/                    the same for TensorBoard
    checkpoints/{step}/             to resume from
    checksums/{step}.json           of that checkpoint's files
    lora/{step}/                    pytorch_lora_weights.safetensors, for diffusers, ComfyUI and infer.py (corrector)
    reward/checkpoint-{step}/       the original's reward checkpoint, for the verifier of that name (reward)
    adapter/{step}/, model/{step}/  an adapter of PEFT, or a folder of Transformers (sft)
    validation/{step:07d}/          bad, good and generated image, side by side (corrector)
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import yaml

from rflow_jax.errors import InputError
from rflow_jax.files import use_folder, write_file

CONFIG = "config.yaml"


def open_folder(out: Path, resume: bool) -> None:
    """Makes sure that this run may write here, before anything expensive begins.

    Raises:
        InputError: another run's files are there and it is not to be resumed, or nothing can be written.
    """
    if jax.process_index():
        return
    taken = use_folder(out)
    if taken and not resume:
        raise InputError(f"{out}: holds files already; add --resume to go on with that run, or give an empty folder")
    if taken and not (out / CONFIG).exists():
        raise InputError(f"{out}: holds files, but no run ({CONFIG} is missing); give another folder")


def write_config(out: Path, config: dict[str, Any]) -> None:
    """Writes the resolved configuration, as YAML that ``--config`` reads again."""
    if jax.process_index() == 0:
        write_file(out / CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def fresh(folder: Path) -> Path:
    """The folder, empty: what a killed run left of it is made again."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder
