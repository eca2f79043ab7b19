"""Where the shards lie: patterns of local files and of addresses, expanded and looked up."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rflow_jax.data.storage.http import probe_http
from rflow_jax.data.storage.patience import Patience, is_http, public
from rflow_jax.data.storage.stores import Store
from rflow_jax.errors import InputError

PIPE = "pipe:"
_LOOKUPS = 16  # at once


@dataclass(frozen=True)
class Shard:
    """One tar file.

    Attributes:
        url: an absolute path, an address, or ``pipe:`` and a shell command.
        size: in bytes; None where it is not known before all is read.
        version: changes when the file does (its time or tag), as far as its store can tell.
    """

    url: str
    size: int | None
    version: str

    @property
    def is_local(self) -> bool:
        """Whether it is a file of this machine."""
        return "://" not in self.url and not self.is_pipe

    @property
    def is_pipe(self) -> bool:
        """Whether it is what a shell command writes."""
        return self.url.startswith(PIPE)

    @property
    def name(self) -> str:
        """The same wherever it lies: the last part of its path, or the command."""
        return self.url if self.is_pipe else public(self.url).rpartition("/")[2]

    @property
    def shown(self) -> str:
        """For messages: without passwords and signatures."""
        return public(self.url)


def expand(patterns: str | Sequence[str], *, allow_shell: bool = False, patience: Patience = Patience()) -> list[Shard]:
    """The shards that patterns name, in their order (matches of ``*`` sorted); one that is named twice counts once.

    Args:
        patterns: files and folders (their ``*.tar``), ``hf://datasets/owner/name/*.tar``, http(s) addresses, and
            ``gs://``, ``s3://`` or whatever else fsspec knows; ``{000..208}`` and ``{a,b}`` stand for several,
            ``*``, ``?`` and ``[ab]`` match (not over HTTP). ``pipe:COMMAND`` is what a shell command writes.
        allow_shell: permits ``pipe:``.

    Raises:
        InputError: a pattern that matches nothing, cannot be looked up or is not permitted.
    """
    names = [name for pattern in ([patterns] if isinstance(patterns, str) else patterns) for name in _braces(pattern)]
    if not names:
        raise InputError("no shards: name at least one file or pattern, such as folder/*.tar")
    for name in names:
        _permit(name, allow_shell)
    # One of each kind for all threads, so that each folder is listed once.
    stores = {name.partition("://")[0]: name for name in names if _in_store(name)}
    stores = {scheme: Store(name) for scheme, name in stores.items()}
    with ThreadPoolExecutor(_LOOKUPS) as pool:
        found = pool.map(partial(_find, stores=stores, patience=patience), names)
        # By address: a store may word the version of a file in one way in a listing and in another alone.
        return list({shard.url: shard for shards in found for shard in shards}.values())


def _braces(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        # A backslash is part of a command, not an escape.
        return list(braceexpand(pattern, escape=not pattern.startswith(PIPE)))
    except ValueError as error:
        raise InputError(f"{pattern}: braces do not match; a range is written {{000..208}}") from error


def _permit(name: str, allow_shell: bool) -> None:
    if name.startswith(PIPE) and not allow_shell:
        raise InputError(f"{name}: runs a shell command; set allow_shell to true if it may")
    if name.startswith(("http://", "https://")) and "*" in name:
        raise InputError(f"{public(name)}: no folder can be listed over HTTP; name the files with {{000..208}}")


def _in_store(name: str) -> bool:
    return "://" in name and not name.startswith(("http://", "https://", "file://", PIPE))


def _find(name: str, stores: dict[str, Store], patience: Patience) -> list[Shard]:
    if name.startswith(PIPE):
        return [Shard(name, None, "")]
    if _in_store(name):
        found = stores[name.partition("://")[0]].find(name, patience)
        return [Shard(*one) for one in found]
    if is_http(name):
        probe = probe_http(name, patience)
        return [Shard(name, probe.size, probe.version)]
    return _find_local(name)


def _find_local(name: str) -> list[Shard]:
    path = Path(name.removeprefix("file://")).expanduser()
    pattern = str(path / "*.tar") if path.is_dir() else str(path)
    # A name that exists is taken as it is, whatever letters are in it.
    paths = [pattern] if path.is_file() else sorted(glob.glob(pattern, recursive=True))
    files = [os.path.abspath(p) for p in paths if os.path.isfile(p)]
    if not files:
        raise InputError(f"{pattern}: no shard matches")
    stats = [os.stat(file) for file in files]
    return [Shard(file, s.st_size, str(s.st_mtime_ns)) for file, s in zip(files, stats, strict=True)]
