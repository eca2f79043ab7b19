"""Files in stores that fsspec knows: object stores by their packages, the Hub's listings by huggingface_hub."""

from __future__ import annotations

from typing import Any, NamedTuple

from rflow_jax.data.storage.retry import SLOWEST, RetryPolicy, TransientError, with_retries
from rflow_jax.errors import InputError

_MAGIC = frozenset("*?[")
# What stores call the tag that changes with a file's content, best first.
_VERSION_KEYS = ("blob_id", "ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "updated", "created")


class Found(NamedTuple):
    """A file of a store; ``size`` in bytes, None if the store does not say."""

    url: str
    size: int | None
    version: str


class Store:
    """One file system of fsspec, to look up files; threads may share it.

    Args:
        url: any address in it.

    Raises:
        InputError: its package is not installed, or fsspec does not know the scheme.
    """

    def __init__(self, url: str):
        self._fs = _open(url)[0]

    def find(self, url: str, patience: RetryPolicy) -> list[Found]:
        """The files that an address names, sorted; it may hold ``*``, ``?`` and ``[ab]``.

        Raises:
            InputError: none does, or the store does not answer.
        """
        path = self._fs._strip_protocol(url)

        def look() -> dict[str, Any]:
            try:
                return self._fs.glob(path, detail=True) if _MAGIC & set(path) else {path: self._fs.info(path)}
            except FileNotFoundError:
                return {}
            except PermissionError as error:
                raise InputError(f"{url}: access is refused ({_line(error)})") from error
            except Exception as error:  # each store has errors of its own, without a common base
                raise TransientError(_line(error)) from error

        infos = {path: info for path, info in with_retries(look, url, patience).items() if info["type"] != "directory"}
        if not infos:
            raise InputError(f"{url}: no shard matches")
        scheme = url.partition("://")[0]
        return [Found(f"{scheme}://{path}", info.get("size"), _version(info)) for path, info in sorted(infos.items())]


def store_range(url: str, start: int, length: int, patience: RetryPolicy) -> bytes:
    """Exactly the ``length`` bytes from ``start``.

    Raises:
        InputError: there is no such file, or no answer.
    """
    from fsspec.asyn import AsyncFileSystem, sync

    def attempt() -> bytes:
        # Looked up at each call: fsspec keeps one for each thread and process, and its event loop is not inherited.
        fs, path = _open(url)
        try:
            if isinstance(fs, AsyncFileSystem):
                limit = patience.timeout + length / SLOWEST
                data = sync(fs.loop, fs._cat_file, path, start=start, end=start + length, timeout=limit)
            else:
                data = fs.cat_file(path, start=start, end=start + length)
        except (FileNotFoundError, PermissionError) as error:
            raise InputError(f"{url}: {_line(error)}") from error
        except Exception as error:  # as above
            raise TransientError(_line(error)) from error
        if data is None or len(data) != length:
            raise TransientError(f"{len(data or b'')} bytes came instead of {length}")
        return bytes(data)

    return with_retries(attempt, url, patience)


def _open(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"{url}: {_line(error)}") from error


def _version(info: dict[str, Any]) -> str:
    return next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
