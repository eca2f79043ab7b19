"""A model's name -> a folder on this machine; the Hub is only asked for what is not there."""

from __future__ import annotations

import re
from pathlib import Path

from rflow_jax.errors import InputError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# What a diffusers-layout repository holds besides these (single files, other formats) is not fetched.
WANTED = [
    "model_index.json",
    "rflow_model.json",
    *(f"{folder}/*" for folder in ("scheduler", "tokenizer", "tokenizer_2", "transformer", "vae")),
    *(f"{folder}/*" for folder in ("text_encoder", "text_encoder_2")),
]
UNWANTED = ["*.bin", "*.msgpack", "*.onnx", "*.onnx_data", "*.pth", "*.gguf"]


def resolve(model: str) -> Path:
    """The folder of a model.

    Args:
        model: a folder, or ``owner/name`` (``owner/name@revision``) on the Hub. Fetched files stay in
            huggingface_hub's cache, and a cached copy serves without a network; ``HF_TOKEN`` is honoured.

    Raises:
        InputError: no such folder, and not on the Hub or in its cache.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(
            f"{model}: a file; a model is a folder (convert a single file with python -m convert_weights flux)"
        )
    if not HUB_ID.fullmatch(model):
        raise InputError(f"{model}: no such folder, and not a Hub id (owner/name)")
    return _fetch(model)


def _fetch(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    name, _, revision = model.partition("@")

    def download(offline: bool) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=WANTED,
                ignore_patterns=UNWANTED,
                local_files_only=offline,
            )
        )

    try:
        return download(offline=False)
    except GatedRepoError as error:
        raise InputError(f"{model}: gated on the Hub; accept its licence there and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{model}: no such folder, and no such model on the Hub (private ones need HF_TOKEN)"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        try:
            return download(offline=True)
        except LocalEntryNotFoundError:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{model}: no such folder, not in the cache, and the Hub does not answer ({reason})"
            ) from error
