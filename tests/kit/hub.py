"""Repositories of the Hub made of local folders, in place of huggingface_hub's downloads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id  # pyright: ignore[reportPrivateImportUsage]


class FakeHub:
    """Serves folders by repository through huggingface_hub's functions, with its own filter of patterns.

    Attributes:
        fetched: the files of the last download.
        revisions: that each download named.
    """

    def __init__(self, monkeypatch: Any, cache: Path, repositories: Mapping[str, Path]):
        self._repositories, self._cache = dict(repositories), cache
        self.fetched: list[str] = []
        self.revisions: list[str | None] = []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", self.files)

    def files(self, repository: str, *, revision: str | None = None) -> list[str]:
        """The paths in a repository."""
        validate_repo_id(repository)
        self.revisions.append(revision)
        if repository not in self._repositories:
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        if revision not in (None, "main", "v2"):
            raise RevisionNotFoundError.__new__(RevisionNotFoundError)
        root = self._repositories[repository]
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())

    def cache_of(self, repository: str) -> Path:
        """Where its files are after a download."""
        return self._cache / repository.replace("/", "--")

    def download(
        self,
        repository: str,
        *,
        revision: str | None,
        allow_patterns: list[str],
        ignore_patterns: list[str],
        local_files_only: bool = False,
    ) -> str:
        files = self.files(repository, revision=revision)
        self.fetched = list(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        folder = self.cache_of(repository)
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.fetched:
            copy = folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists():
                copy.symlink_to(self._repositories[repository] / name)
        return str(folder)
