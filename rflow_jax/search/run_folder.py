"""The folder of a run, as a whole: who may write there, and whether it is the same search."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import yaml

from rflow_jax.errors import InputError
from rflow_jax.openai_client import public_url
from rflow_jax.utils.atomic_io import try_lock, use_folder
from rflow_jax.verifiers.config import ENSEMBLE, VerifierConfig
from rflow_jax.writers.base import TextGeneratorConfig

CONFIG = "config.yaml"
# What may be another at the next start: it changes when, where and for how much, but no result.
NOT_IN_FINGERPRINT = (
    "prompts",
    "out",
    "start",
    "end",
    "share",
    "distributed",
    "mesh",
    "scan_blocks",
    "prompts_in_flight",
    "budget",
)
FREE_OF_A_MODEL = (
    "base_url",
    "api_key_env",
    "timeout",
    "concurrency",
    "max_retries",
    "price_input",
    "price_output",
)
LOCAL = ("nvila", "reward", "clip")
FREE_OF_A_LOCAL_MODEL = ("batch_size", "devices")
MODELS = ("verifier", "reflector", "refiner")


def require_usable(out: Path) -> None:
    """Makes the folder of a run, or checks that it is one; before anything expensive begins.

    Raises:
        InputError: it holds other files, cannot be made, or cannot be written to.
    """
    taken = use_folder(out)
    if taken and not (out / CONFIG).exists():
        raise InputError(f"{out}: holds files, but no search ({CONFIG} is missing); give another folder as --out")


def require_same(out: Path, config: Mapping[str, Any]) -> None:
    """Makes sure that a run which is to go on is this one; a folder without a run is any.

    Raises:
        InputError: something that changes results is set otherwise now; names it.
    """
    path = out / CONFIG
    if not path.exists():
        return
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert isinstance(before, dict)
    except (ValueError, AssertionError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read; give another folder as --out") from error
    was, now = _flat(_meaning(before)), _flat(_meaning(config))
    other = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    if other:
        key = other[0]
        more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
        raise InputError(
            f"{out}: holds another search: {key} is {was.get(key)} there and {now.get(key)} now{more}; set it so "
            "again, or give a new folder as --out"
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
        """Gives it up."""
        if self._lock is not None:
            self._lock.unlink(missing_ok=True)  # while it is locked: it must not be another's by then
        self._held.close()


def claim(out: Path, config: Mapping[str, Any], place: int) -> Claim:
    """Writes the configuration if the run is new, and keeps other processes with this place out while this one lives.

    Raises:
        InputError: another process works here, or began another search a moment ago.
    """
    path = out / CONFIG
    if not path.exists():
        _write_first(path, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
    require_same(out, config)
    lock = out / f".{CONFIG}.{place}.lock" if place else None  # a file for each process of a run
    held = try_lock(lock or path)
    if held is None:
        raise InputError(f"{out}: another process is at work in this folder; wait for it, or give another")
    return Claim(held, lock)


def _write_first(path: Path, content: str) -> None:
    """Writes a file that is not there yet; of several processes the first one's stays, for claims are held on it."""
    own = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    own.write_text(content, encoding="utf-8")
    try:
        os.link(own, path)
    except FileExistsError:
        pass
    except OSError:  # the file system has no links
        os.replace(own, path)
    own.unlink(missing_ok=True)


def _meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """What results follow from."""
    kept = {key: value for key, value in config.items() if key not in NOT_IN_FINGERPRINT}
    for role in MODELS:
        if isinstance(kept.get(role), Mapping):
            kept[role] = result_affecting(kept[role])
    return kept


def result_affecting(section: Mapping[str, Any]) -> dict[str, Any]:
    """What the answers of a model follow from, of all that its section of a configuration says."""
    kept = {key: value for key, value in section.items() if key not in FREE_OF_A_MODEL}
    name, options = kept.get("name"), kept.get("options")
    if not isinstance(options, Mapping):
        return kept
    if name in LOCAL:
        kept["options"] = {key: value for key, value in options.items() if key not in FREE_OF_A_LOCAL_MODEL}
    elif name == ENSEMBLE and isinstance(members := options.get("members"), (list, tuple)):
        kept["options"] = {
            **options,
            "members": [result_affecting(m) if isinstance(m, Mapping) else m for m in members],
        }
    return kept


def public_section(model: VerifierConfig | TextGeneratorConfig) -> dict[str, Any]:
    """A model's section as YAML that ``--config`` reads again; addresses lose what may be secret in them."""
    section = asdict(model)
    if model.asks_endpoint:
        section["model"] = model.model_name
    if model.base_url:
        section["base_url"] = public_url(model.base_url)
    if isinstance(model, VerifierConfig) and model.members:
        pairs = zip(model.members, section["options"]["members"], strict=True)
        section["options"]["members"] = [_public_member(member, given) for member, given in pairs]
    return section


def _public_member(member: VerifierConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """As :func:`public_section`, but what was not given stays away."""
    section = public_section(member)
    return {key: value for key, value in section.items() if key in given or (key == "model" and member.asks_endpoint)}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
