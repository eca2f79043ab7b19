"""A model's name -> a folder on this machine: a path, a model that comes with the package, or a copy from the Hub."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rflow_jax.errors import InputError
from rflow_jax.utils.network import require_usable_network
from rflow_jax.weights.packed import is_packed, unpacked

_PACKAGE = Path(__file__).parents[1]
BUNDLED = (_PACKAGE / "shapes" / "models", _PACKAGE / "testing" / "models")
# Other files of a diffusers-layout repository (single files, other formats) are not fetched.
WANTED = [
    "model_index.json",
    "rflow_model.json",
    *(f"{folder}/*" for folder in ("scheduler", "tokenizer", "tokenizer_2", "transformer", "vae")),
    *(f"{folder}/*" for folder in ("text_encoder", "text_encoder_2")),
]
WANTED_TEXT = [f"{folder}/*" for folder in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")]
WANTED_LORA = ["*.safetensors", "*.json"]
WANTED_VLM = ["*.safetensors", "*.json", "*.jinja", "*merges.txt"]
_BESIDE_STEPS = ["model_config.json", "prompt.md"]  # of a reward model
MODEL_FILES = ("model_index.json", "rflow_model.json", "config.json", "packed.json")  # one is in each model's folder
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")  # a name that ends so is a file's
UNWANTED = ["*.bin", "*.msgpack", "*.onnx", "*.onnx_data", "*.pth", "*.gguf"]
STEP = re.compile(r"checkpoint-(\d+)")  # a folder of a reward model

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)((?:/[^/:@]+)*)(?::([^:@]+))?(?:@([\w./-]+))?")
_HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co"}
_FILE_PAGES = ("blob", "resolve", "raw")
_REPOSITORY = r"(?P<repository>[\w.-]+/[\w.-]+)"
_PAGE = re.compile(_REPOSITORY + rf"(?:/(?P<page>tree|{'|'.join(_FILE_PAGES)})/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?")
_HF_PATH = re.compile(_REPOSITORY + r"(?:@(?P<revision>[^/]+))?(?:/(?P<path>.*))?")
_NAMED = 5  # folders to name


@dataclass(frozen=True)
class HubId:
    """A model on the Hub: ``owner/name``, ``owner/name/folder`` or ``owner/name:file``, each with ``@revision``.

    Attributes:
        repository: ``owner/name``.
        path: of the folder or file in it; empty for the whole.
        is_file: whether it is a file.
        revision: a branch, tag or commit; None: the main branch.
    """

    repository: str
    path: str = ""
    is_file: bool = False
    revision: str | None = None

    @classmethod
    def parse(cls, name: str) -> HubId | None:
        """The parts of a name or of a page's address; None if it is neither.

        Raises:
            InputError: the address is of something else on the Hub.
        """
        if name.partition("/")[0] in _HOSTS:
            name = f"https://{name}"
        if "://" in name:
            return cls._of_address(name)
        match = _HUB_ID.fullmatch(name.rstrip("/"))
        if match is None:
            return None
        repository, folder, file, revision = match.groups()
        parts = [part for part in f"{folder}/{file or ''}".split("/") if part]
        if {".", ".."} & {*parts, *repository.split("/")}:
            return None
        path = "/".join(parts)
        return cls(repository, path, file is not None or path.endswith(WEIGHTS), revision)

    @classmethod
    def _of_address(cls, address: str) -> HubId | None:
        """As :meth:`parse`, of ``https://huggingface.co/...`` (or ``HF_ENDPOINT``) and ``hf://...``."""
        parts = urlsplit(address)
        if parts.scheme == "hf":
            path, pattern = parts.netloc + parts.path, _HF_PATH
        elif parts.scheme in ("http", "https") and parts.netloc in (*_HOSTS, urlsplit(_endpoint()).netloc):
            path, pattern = parts.path.strip("/"), _PAGE
        else:
            return None
        if (kind := path.partition("/")[0]) in ("datasets", "spaces"):
            raise InputError(f"{address}: is not a model, but of the Hub's {kind}")
        match = pattern.fullmatch(path)
        if match is None:
            raise InputError(f"{address}: not the page of a model, a folder or a file; name it as owner/name/folder")
        found = match.groupdict()
        inside = unquote(found["path"] or "").strip("/")
        is_file = found.get("page") in _FILE_PAGES or inside.endswith(WEIGHTS)
        return cls(found["repository"], inside, is_file, unquote(found["revision"]) if found["revision"] else None)

    def below(self, pattern: str) -> str:
        """A pattern of files in the folder, as one of the repository's files."""
        return f"{glob.escape(self.path)}/{pattern}" if self.path else pattern


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def resolve(model: str, wanted: Sequence[str] = WANTED) -> Path:
    """The folder or file of a model.

    Args:
        model: a path, a model that comes with the package (``shapes``), or a :class:`HubId` or its page's address.
            Fetched files stay in huggingface_hub's cache, which also serves offline; ``HF_TOKEN`` is honoured.
        wanted: patterns of the files to fetch.

    Raises:
        InputError: no such file or folder, and not on the Hub or in its cache.
    """
    return _local(model) or _from_hub(model, _hub_id(model), wanted)


def resolve_lora(lora: str) -> Path:
    """The file or folder of a LoRA; arguments and errors as :func:`resolve`."""
    return _local(lora) or _from_hub(lora, _hub_id(lora), WANTED_LORA, flat=True)


def resolve_vlm(model: str) -> Path:
    """The folder of a vision-language model; arguments and errors as :func:`resolve`."""
    if (path := _local(model)) is not None:
        return path
    hub = _hub_id(model, folder=True)
    folder = _from_hub(model, hub, WANTED_VLM, flat=True)
    if not (folder / "config.json").is_file():
        raise _missing(model, hub, "config.json")
    return folder


def resolve_reward(model: str, step: int | None = None) -> Path:
    """The folder of a reward model, or of one of its checkpoints; arguments and errors as :func:`resolve`.

    Args:
        step: the ``checkpoint-N`` to fetch; None: all.
    """
    if (path := _local(model)) is not None:
        return path
    hub = _hub_id(model, folder=True)
    files = [*WANTED_VLM, "*.pth"]
    parent, _, name = hub.path.rpartition("/")
    if STEP.fullmatch(name):
        beside = [HubId(hub.repository, parent).below(file) for file in _BESIDE_STEPS]
        return _from_hub(model, hub, files, unwanted=[], beside=beside)
    if step is not None:
        files = [*_BESIDE_STEPS, *(f"checkpoint-{step}/{pattern}" for pattern in files)]
    return _from_hub(model, hub, [*files, *_BESIDE_STEPS], unwanted=[])


def short_name(model: str) -> str:
    """A model's name for records: the last part of a path, or what follows the owner on the Hub."""
    own = Path(model).expanduser()
    hub = None if own.exists() else HubId.parse(model)
    return own.name if hub is None else "/".join(filter(None, (hub.repository.partition("/")[2], hub.path)))


def _local(name: str) -> Path | None:
    own = Path(name).expanduser()
    if ":" in name and not own.exists():
        own = Path(name.replace(":", "/", 1)).expanduser()
    bundled = next((folder / name for folder in BUNDLED if name and "/" not in name and (folder / name).exists()), None)
    # A folder of a bundled model's name that holds anything else, such as pictures, does not hide it.
    mine = own.is_file() or any((own / name).exists() for name in MODEL_FILES) or any(own.glob("*.safetensors"))
    hidden = bundled is not None and not mine
    found = bundled if hidden or not own.exists() else own
    return unpacked(found) if found is not None and is_packed(found) else found


def _hub_id(name: str, *, folder: bool = False) -> HubId:
    """The id of what is not here; raises InputError if it cannot be on the Hub either, or has to be a folder."""
    hub = HubId.parse(name)
    if hub is None:
        raise InputError(f"{name}: no such file or folder, and not a Hub id (owner/name)")
    if hub.path and hub.revision is None and "://" not in name and Path(hub.repository).exists():
        raise InputError(f"{name}: no such file or folder in {hub.repository}, which is here and so not the Hub's")
    if folder and hub.is_file:
        raise InputError(f"{name}: a file; name the folder of the model (owner/name/folder)")
    return hub


def _from_hub(
    name: str,
    hub: HubId,
    patterns: Sequence[str],
    *,
    unwanted: Sequence[str] = UNWANTED,
    flat: bool = False,
    beside: Sequence[str] = (),
) -> Path:
    """Fetches files of a model, and returns where they are.

    Args:
        patterns: of files in its folder.
        flat: leave out those in its sub-folders.
        beside: patterns of the repository's files that are fetched too.
    """
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

    if hub.is_file:  # and the configurations beside it, such as that of an adapter
        folder = HubId(hub.repository, hub.path.rpartition("/")[0])
        allowed, ignored = [glob.escape(hub.path), folder.below("*.json")], [folder.below("*/*")]
    else:
        allowed = [*map(hub.below, patterns), *beside]
        ignored = [*unwanted, *([hub.below("*/*")] if flat else [])]
    download = partial(
        snapshot_download, hub.repository, revision=hub.revision, allow_patterns=allowed, ignore_patterns=ignored
    )
    try:
        root = Path(download())
    except HFValidationError as error:  # such as -owner/name
        raise InputError(f"{name}: no such file or folder, and not a Hub id (owner/name)") from error
    except GatedRepoError as error:
        raise InputError(f"{name}: gated on the Hub; accept its licence there and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{name}: no such folder, and not on the Hub (private ones need HF_TOKEN)") from error
    except RevisionNotFoundError as error:
        hint = f" ({name.partition('@')[0]}/...@revision for a folder)" if "/" in (hub.revision or "") else ""
        reason = f"{hub.repository} is on the Hub, but has no revision {hub.revision or 'main'}{hint}"
        raise InputError(f"{name}: {reason}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        try:
            root = Path(download(local_files_only=True))
        except LocalEntryNotFoundError:
            raise InputError(f"{name}: no such folder, and the Hub does not answer ({reason})") from error
    found = root / hub.path
    if found.is_file() if hub.is_file else any(found.glob("*")):
        return found
    raise _missing(name, hub, hub.path or "files of such a model")


def _missing(name: str, hub: HubId, what: str) -> InputError:
    """The error that something of a repository is not there, with the places of its weights."""
    from huggingface_hub import list_repo_files

    try:
        files = [file for file in list_repo_files(hub.repository, revision=hub.revision) if file.endswith(WEIGHTS)]
    except Exception:  # whatever it is, it is not what went wrong
        return InputError(f"{name}: the copy here has no {what}, and the Hub does not answer")
    if hub.is_file:
        places = [f"{hub.repository}:{file}" for file in files]
    else:
        places = sorted({f"{hub.repository}/{file}".rpartition("/")[0] for file in files})
    hint = f"; its weights are in {', '.join(places[:_NAMED])}{', ...' if len(places) > _NAMED else ''}"
    return InputError(f"{name}: {hub.repository} is on the Hub, but has no {what}{hint if places else ''}")


def cached(model: str) -> Path | None:
    """The folder of a model in huggingface_hub's cache, if it is there; nothing is fetched."""
    hub = HubId.parse(model)
    if hub is None:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub.repository, revision=hub.revision, local_files_only=True)) / hub.path
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    return folder if folder.exists() else None
