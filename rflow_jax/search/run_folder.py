"""The folder of a run: which process may write there, and whether it contains the same search."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import yaml

from rflow_jax.errors import InputError
from rflow_jax.openai_client.endpoint import Connection, public_url
from rflow_jax.search.config import RunConfig, SearchConfig
from rflow_jax.utils.atomic_io import is_blank, naming_file, sync_folder, try_lock, use_folder
from rflow_jax.utils.checks import current_key, flatten
from rflow_jax.utils.files import read_bytes
from rflow_jax.utils.yaml_files import read_yaml
from rflow_jax.verifiers.config import VERIFIERS, EnsembleVerifierConfig, VerifierConfig
from rflow_jax.writers.base import WRITERS, TextGeneratorConfig

CONFIG = "config.yaml"
MODELS = {"verifier": VERIFIERS, "reflector": WRITERS, "refiner": WRITERS}


def require_usable(out: Path) -> None:
    """Creates the folder of a run, or checks that it is one, before anything expensive begins.

    Raises:
        InputError: it contains other files, cannot be created, or cannot be written to.
    """
    taken = use_folder(out) and any(not _is_beginning(path.name) for path in out.iterdir())
    if taken and not (out / CONFIG).exists():
        raise InputError(f"{out}: contains files, but no search ({CONFIG} is missing); give another folder as --out")


@contextmanager
def left_without_folder(out: Path) -> Iterator[None]:
    """Removes the folders that were made for a run, while nothing is in them, if the run cannot begin."""
    new = [path for path in (out, *out.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):  # of one that is not empty
            for path in new:
                path.rmdir()
        raise


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


class Claim:
    """A claim on a folder, until it is closed or the process ends; a context manager.

    Args:
        held: the file that is locked.
        lock: that file, if it is there for nothing else.
    """

    def __init__(self, held: IO[bytes], lock: Path | None) -> None:
        self._held, self._lock = held, lock

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Releases the claim."""
        if self._lock is not None:
            self._lock.unlink(missing_ok=True)  # while it is locked: it must not be another's by then
        self._held.close()


def claim(out: Path, config: Mapping[str, Any], process_index: int) -> Claim:
    """Writes the configuration if the run is new, and locks out other processes with the same index.

    Raises:
        InputError: another process works here, or began another search a moment ago.
    """
    path = out / CONFIG
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)  # another process of the run may have left it
        _write_first(path, _yaml(config))
    require_same(out, config)
    lock = out / f".{CONFIG}.{process_index}.lock" if process_index else None  # a file for each process of a run
    held = try_lock(lock or path)
    if held is None:
        raise InputError(f"{out}: another process is using this folder; wait for it, or give another")
    if is_blank(read_bytes(path, "configuration")):  # after a power cut; in place, since this file is locked
        with naming_file(path):
            path.write_text(_yaml(config), encoding="utf-8")
            os.fsync(held.fileno())
    return Claim(held, lock)


def _write_first(path: Path, content: str) -> None:
    """Writes a new file; of several processes the first one wins, as the claims lock that file."""
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
    """Whether it is a configuration that was not written to its end."""
    return name.startswith(f".{CONFIG}.") and name.endswith(".tmp")


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
