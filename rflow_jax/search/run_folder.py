"""The folder of a run: which process may write there, and whether it contains the same search."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from rflow_jax.errors import InputError
from rflow_jax.openai_client.endpoint import Connection, public_url
from rflow_jax.search.config import RunConfig, SearchConfig
from rflow_jax.utils.atomic_io import is_blank, naming_file, sync_folder, write_file
from rflow_jax.utils.checks import current_key, flatten
from rflow_jax.utils.files import read_bytes
from rflow_jax.utils.output_folder import Claim, require_present
from rflow_jax.utils.yaml_files import read_yaml
from rflow_jax.verifiers.config import VERIFIERS, EnsembleVerifierConfig, VerifierConfig
from rflow_jax.writers.base import WRITERS, TextGeneratorConfig

CONFIG = "config.yaml"
MODELS = {"verifier": VERIFIERS, "reflector": WRITERS, "refiner": WRITERS}


def claim(out: Path, process_index: int) -> Claim:
    """Locks other processes with the same index out of the folder of a run, which is there.

    Raises:
        InputError: another process works here, or the folder contains other files.
    """
    # Not the configuration, which is written only when the models are loaded.
    held = Claim(out, f".{CONFIG}.{process_index}.lock")
    if not (out / CONFIG).exists() and any(not _is_beginning(path.name) for path in out.iterdir()):
        held.close()
        raise InputError(f"{out}: contains files, but no search ({CONFIG} is missing); give another folder as --out")
    return held


def require_same(out: Path, config: Mapping[str, Any]) -> None:
    """Checks that a run that is to be resumed has the same configuration; a new folder passes.

    Raises:
        InputError: a setting that changes results differs now; names it.
    """
    path = out / CONFIG
    if not path.exists() or is_blank(read_bytes(path, "configuration")):
        return
    try:
        before = read_yaml(path, "configuration")
        if not isinstance(before, dict):
            raise InputError(f"{path}: expected keys with values")
    except InputError as error:
        raise InputError(f"{error}; give another folder as --out") from error
    was, now = flatten(_fingerprint(before)), flatten(_fingerprint(config))
    was = {current_key(key): value for key, value in was.items()}
    other = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    if other:
        key = other[0]
        more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
        # The options of a user's class may hold a password.
        values = "differs" if ".options." in key else f"is {was.get(key)} there and {now.get(key)} now"
        raise InputError(
            f"{out}: contains another search: {key} {values}{more}; set it so again, or give a new folder as --out"
        )


def write_config(out: Path, config: Mapping[str, Any]) -> None:
    """Writes the configuration if the run is new, or if a power cut has taken it.

    Raises:
        InputError: another process has begun another search here a moment ago.
    """
    path = out / CONFIG
    require_present(path)
    if not path.exists():
        _write_first(path, _yaml(config))
    require_same(out, config)
    if is_blank(read_bytes(path, "configuration")):
        write_file(path, _yaml(config))


def _write_first(path: Path, content: str) -> None:
    """Writes a new file; of several processes the first one wins."""
    own = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with naming_file(path):
        try:
            with open(own, "w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            own.unlink(missing_ok=True)
            raise
    try:
        os.link(own, path)
    except FileExistsError:
        pass
    except OSError:  # the file system has no links
        os.replace(own, path)
    own.unlink(missing_ok=True)
    sync_folder(path.parent)
    sync_folder(path.parent.parent)


def _is_beginning(name: str) -> bool:
    """Whether it is a lock, or a configuration that was not written to its end."""
    return name.startswith(f".{CONFIG}.") and name.endswith((".tmp", ".lock"))


def _yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def _fingerprint(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that results depend on."""
    free = {one.name for kind in (SearchConfig, RunConfig) for one in fields(kind) if one.metadata.get("execution")}
    free.add("share")  # of earlier versions: process_index and process_count
    kept = {key: value for key, value in config.items() if key not in free}
    for role, registry in MODELS.items():
        if isinstance(kept.get(role), Mapping):
            kept[role] = registry.results_follow_from(kept[role])
    return kept


def public_section(model: VerifierConfig | TextGeneratorConfig) -> dict[str, Any]:
    """A model's section as YAML that ``--config`` reads again; addresses lose what may be secret in them."""
    section = asdict(model)
    if isinstance(model, Connection):
        if model.asks_endpoint:
            section["model"] = model.model_name
        if model.base_url:
            section["base_url"] = public_url(model.base_url)
    if isinstance(model, EnsembleVerifierConfig):
        section["members"] = [public_section(member) for member in model.members]
    return section
