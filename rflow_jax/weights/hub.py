"""A model's name -> a folder on this machine: a path, a model that comes with the package, or a copy from the Hub."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from rflow_jax.errors import InputError
from rflow_jax.utils.network import require_usable_network
from rflow_jax.weights.packed import is_packed, unpacked

_PACKAGE = Path(__file__).parents[1]
BUNDLED = (_PACKAGE / "shapes" / "models", _PACKAGE / "testing" / "models")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# Other files of a diffusers-layout repository (single files, other formats) are not fetched.
WANTED = [
    "model_index.json",
    "rflow_model.json",
    *(f"{folder}/*" for folder in ("scheduler", "tokenizer", "tokenizer_2", "transformer", "vae")),
    *(f"{folder}/*" for folder in ("text_encoder", "text_encoder_2")),
]
WANTED_LORA = ["*.safetensors", "*.json"]
WANTED_VLM = ["*.safetensors", "*.json", "*.jinja", "*merges.txt"]
WANTED_REWARD = [*WANTED_VLM, "*.pth"]
MODEL_FILES = ("model_index.json", "rflow_model.json", "config.json", "packed.json")  # one is in each model's folder
UNWANTED = ["*.bin", "*.msgpack", "*.onnx", "*.onnx_data", "*.pth", "*.gguf"]


def resolve(model: str, wanted: list[str] = WANTED) -> Path:
    """The folder of a model.

    Args:
        model: a folder, a model that comes with the package (``shapes``), or ``owner/name`` (``owner/name@revision``)
            on the Hub. Fetched files stay in huggingface_hub's cache, which also serves offline; ``HF_TOKEN`` is
            honoured.
        wanted: patterns of the files to fetch.

    Raises:
        InputError: no such folder, and not on the Hub or in its cache.
    """
    return _local(model) or _from_hub(model, wanted)


def resolve_lora(lora: str) -> Path:
    """The file or folder of a LoRA, or the folder of one on the Hub (``owner/name``); errors as :func:`resolve`."""
    return _local(lora) or _from_hub(lora, WANTED_LORA)


def resolve_vlm(model: str, *, reward: bool = False) -> Path:
    """The folder of a vision-language model, or of a reward model's checkpoints; errors as :func:`resolve`."""
    if (path := _local(model)) is not None:
        return path
    return _from_hub(model, WANTED_REWARD, unwanted=[]) if reward else _from_hub(model, WANTED_VLM)


def _local(name: str) -> Path | None:
    own = Path(name).expanduser()
    bundled = next((folder / name for folder in BUNDLED if name and "/" not in name and (folder / name).exists()), None)
    # A folder of a bundled model's name that holds anything else, such as pictures, does not hide it.
    mine = own.is_file() or any((own / name).exists() for name in MODEL_FILES) or any(own.glob("*.safetensors"))
    hidden = bundled is not None and not mine
    found = bundled if hidden or not own.exists() else own
    return unpacked(found) if found is not None and is_packed(found) else found


def _from_hub(name: str, patterns: list[str], unwanted: list[str] = UNWANTED) -> Path:
    if not HUB_ID.fullmatch(name):
        raise InputError(f"{name}: no such file or folder, and not a Hub id (owner/name)")
    require_usable_network()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = name.partition("@")
    download = partial(
        snapshot_download, repository, revision=revision or None, allow_patterns=patterns, ignore_patterns=unwanted
    )
    try:
        return Path(download())
    except HFValidationError as error:  # such as ../folder
        raise InputError(f"{name}: no such file or folder, and not a Hub id (owner/name)") from error
    except GatedRepoError as error:
        raise InputError(f"{name}: gated on the Hub; accept its licence there and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{name}: no such folder, and not on the Hub (private ones need HF_TOKEN)") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{name}: {repository} is on the Hub, but has no revision {revision or 'main'}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        try:
            return Path(download(local_files_only=True))
        except LocalEntryNotFoundError:
            raise InputError(f"{name}: no such folder, and the Hub does not answer ({reason})") from error


def cached(model: str) -> Path | None:
    """The folder of a model in huggingface_hub's cache, if it is there; nothing is fetched."""
    if not HUB_ID.fullmatch(model):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repository, _, revision = model.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None
