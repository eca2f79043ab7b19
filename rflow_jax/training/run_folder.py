"""The folder of a run.

::

    .lock                           while a run is active
    config.yaml                     the resolved configuration, as the newest start had it
    metrics.jsonl                   one line of numbers per step
    tensorboard/                    the same for TensorBoard
    wandb_id                        what wandb knows the run by
    checkpoints/{step}/             to resume from
    checksums/{step}.json           of that checkpoint's files
    lora/{step}/                    pytorch_lora_weights.safetensors, for diffusers, ComfyUI and infer.py (corrector)
    reward/checkpoint-{step}/       the original's reward checkpoint, for the verifier of that name (reward)
    adapter/{step}/, model/{step}/  an adapter of PEFT, or a folder of Transformers (sft)
    validation/{step:07d}/          bad, good and generated image, side by side (corrector)
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import yaml

from rflow_jax.errors import InputError
from rflow_jax.utils.atomic_io import write_file
from rflow_jax.utils.output_folder import LOCK, Claim, usable_folder

CONFIG = "config.yaml"
log = logging.getLogger(__name__)


@contextmanager
def open_folder(out: Path, resume: bool) -> Iterator[None]:
    """Checks that this run may write here, before anything expensive begins, and locks out other runs meanwhile.

    Of several processes only the first checks and locks the folder.

    Raises:
        InputError: another run's files are there and it is not to be resumed, another run is active, or nothing can be
            written.
    """
    if jax.process_index():
        yield
        return
    with usable_folder(out), ExitStack() as stack:
        try:
            stack.enter_context(Claim(out))
        except InputError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            log.warning("%s; make sure that no other run writes there", error)
        # A configuration that was not written to its end is no file.
        taken = any(path.name != LOCK and not path.match(f".{CONFIG}.*.tmp") for path in out.iterdir())
        if taken and not (out / CONFIG).exists():
            raise InputError(f"{out}: contains files, but no run ({CONFIG} is missing); give another folder")
        if taken and not resume:
            raise InputError(
                f"{out}: contains files already; add --resume to continue that run, or give an empty folder"
            )
        yield


def write_config(out: Path, config: dict[str, Any]) -> None:
    """Writes the resolved configuration, as YAML that ``--config`` reads again."""
    if jax.process_index() == 0:
        write_file(out / CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def fresh(folder: Path) -> Path:
    """The folder, after deleting what a killed run left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder
