"""Files over HTTP(S) and on the Hub: their sizes, and byte ranges of them.

Each process makes its client when first needed, so that nothing here hinders forking or pickling.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from rflow_jax.data.storage.retry import (
    LONGEST_RETRY_AFTER,
    RetryPolicy,
    TransientError,
    enforce_min_throughput,
    public,
    with_retries,
)
from rflow_jax.errors import InputError
from rflow_jax.utils.file_kinds import web_page
from rflow_jax.utils.network import asked_pause, is_loopback, printable, uses_environment
from rflow_jax.utils.shown import one_line

if TYPE_CHECKING:
    import httpx

_MOVED_FOR = 600.0  # seconds; signed addresses of the Hub and of object stores hold for an hour
_REDIRECTS = 10
_BUSY = {408, 425, 429}
_HUB = re.compile(r"hf://(?:(datasets|spaces)/)?([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)")
_CONTENT_RANGE = re.compile(r"bytes (?:([0-9]{1,18})-([0-9]{1,18})|\*)/([0-9]{1,18}|\*)")


class NoRanges(InputError):
    """The server sends whole files only."""


class Probe(NamedTuple):
    """What a server says about a file; ``size`` in bytes, None if it does not say."""

    size: int | None
    version: str
    ranges: bool


def probe_http(url: str, retry: RetryPolicy) -> Probe:
    """Asks for the first byte, which tells more than HEAD does and works with addresses signed for GET.

    Raises:
        InputError: there is no such file, or no answer.
    """

    def attempt() -> Probe:
        with http_get(url, {"Range": "bytes=0-0"}, retry) as (response, chunks):
            version = response.headers.get("ETag") or response.headers.get("Last-Modified", "")
            if response.status_code == 200:
                next(chunks, b"")  # so that a web page is seen
                length = response.headers.get("Content-Length")
                return Probe(int(length) if length else None, version, False)
            return Probe(_content_range(response)[2], version, True)

    return with_retries(attempt, url, retry)


def http_range(url: str, start: int, length: int, size: int | None, retry: RetryPolicy) -> bytes:
    """Exactly the ``length`` bytes from ``start``.

    Args:
        size: the file's size when it was indexed; another one now is an error.

    Raises:
        NoRanges: the server ignores the range.
        InputError: there is no such file, it changed, or no answer.
    """

    def attempt() -> bytes:
        with http_get(url, {"Range": f"bytes={start}-{start + length - 1}"}, retry) as (response, chunks):
            if response.status_code == 200:
                next(chunks, b"")  # as above
                raise NoRanges(
                    f"{public(url)}: the server does not serve byte ranges; stream the shards (data.format: stream) "
                    "or download them"
                )
            first, last, total = _content_range(response)
            if size is not None and total is not None and total != size:
                raise InputError(f"{public(url)}: {total} bytes, {size} when it was indexed; start again to index it")
            if (first, last) != (start, start + length - 1):
                raise TransientError(f"bytes {first}-{last} came instead of {start}-{start + length - 1}")
            data = b"".join(at_most(length, chunks, url))
        if len(data) != length:
            raise TransientError(f"{len(data)} bytes came instead of {length}")
        return data

    return with_retries(attempt, url, retry)


@contextmanager
def http_get(url: str, headers: dict[str, str], retry: RetryPolicy) -> Iterator[tuple[httpx.Response, Iterator[bytes]]]:
    """One GET: the response (status 200, 206 or 416) and its body, chunk by chunk.

    Raises:
        TransientError: another attempt may help.
        InputError: retrying will not help.
    """
    import httpx

    known = _moved.get(url)
    moved = known is not None and time.monotonic() < known[1]
    address, own = (known[0], {}) if known is not None and moved else _address(url)
    headers = {"Accept-Encoding": "identity", **own, **headers}
    try:
        with _opened(address, headers, retry, url) as (response, redirected):
            if response.status_code not in (200, 206, 416) and moved:
                _moved.pop(url, None)
                raise TransientError(f"status {response.status_code} where it was redirected to")
            _check_status(url, response)
            if redirected and not moved:
                _moved[url] = (str(response.url), time.monotonic() + _MOVED_FOR)
            chunks = enforce_min_throughput(response.iter_raw(), retry.timeout)
            yield response, _of_a_file(chunks, response, url) if response.status_code == 200 else chunks
    except httpx.TransportError as error:
        raise TransientError(f"{error or 'no answer'} ({type(error).__name__})") from error
    except httpx.InvalidURL as error:
        raise InputError(f"{public(url)}: not a valid address ({printable(str(error))})") from error


@contextmanager
def _opened(
    address: str, headers: dict[str, str], retry: RetryPolicy, url: str
) -> Iterator[tuple[httpx.Response, bool]]:
    """The response of an address, or of where it redirects to, and whether it does.

    The bodies of redirections are not read.
    """
    request = _client(address).build_request("GET", address, headers=headers, timeout=retry.timeout)
    for number in range(_REDIRECTS + 1):
        response = _client(str(request.url)).send(request, stream=True, follow_redirects=False)
        try:
            if response.next_request is None:
                yield response, number > 0
                return
            request = response.next_request
        finally:
            response.close()
    raise InputError(f"{public(url)}: is redirected more than {_REDIRECTS} times; check the address")


def _of_a_file(chunks: Iterator[bytes], response: httpx.Response, url: str) -> Iterator[bytes]:
    """The chunks of a body; raises InputError if they are a web page or JSON, which come in place of files."""
    first = next(chunks, b"")
    what = web_page(first)
    if what is None and "json" in response.headers.get("Content-Type", "") and first.lstrip()[:1] in (b"{", b"["):
        what = f"JSON ({one_line(printable(first[:200].decode('utf-8', 'replace')), 80)})"
    if what:
        where = public(str(response.url))
        moved = "" if where == public(url) else f" from {where}"
        raise InputError(
            f"{public(url)}: the server sends {what}{moved}, not the file; sign in, or check address and network"
        )
    yield first
    yield from chunks


def at_most(limit: int, chunks: Iterable[bytes], url: str) -> Iterator[bytes]:
    """The chunks of a body; raises InputError as soon as they are more than ``limit`` bytes."""
    for chunk in chunks:
        limit -= len(chunk)
        if limit < 0:
            raise InputError(f"{public(url)}: the server sends more bytes than were asked for; download the shards")
        yield chunk


_clients: dict[tuple[int, bool], httpx.Client] = {}
_moved: dict[str, tuple[str, float]] = {}  # address -> where it redirects to, and until when that is believed


def _client(address: str) -> httpx.Client:
    """The client for an address; no proxy of the environment is used for one of this machine.

    Raises:
        InputError: the environment names a proxy or certificates that cannot be used.
    """
    import httpx

    # One per process: a forked child must not speak on its parent's connections.
    here = is_loopback(address)
    if (client := _clients.get((os.getpid(), here))) is None:
        # Its log lines name every request, with the signatures that are in the addresses.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        client = _clients.setdefault(
            (os.getpid(), here), httpx.Client(trust_env=uses_environment(address), limits=limits)
        )
    return client


def _address(url: str) -> tuple[str, dict[str, str]]:
    if not url.startswith("hf://"):
        return url, {}
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # pyright: ignore[reportPrivateImportUsage]

    match = _HUB.fullmatch(url)
    if match is None:
        raise InputError(f"{url}: not of the form hf://datasets/owner/name/file.tar")
    kind, repository, revision, path = match.groups()
    revision = unquote(revision) if revision else None
    address = hf_hub_url(repository, path, repo_type=kind.removesuffix("s") if kind else None, revision=revision)
    return address, build_hf_headers()


def _check_status(url: str, response: httpx.Response) -> None:
    status = response.status_code
    if status in _BUSY or status >= 500:
        raise TransientError(f"status {status}", asked_pause(response.headers, LONGEST_RETRY_AFTER))
    if status in (401, 403):
        hint = "set HF_TOKEN" if url.startswith("hf://") else "the address needs a password or a signature"
        raise InputError(f"{public(url)}: access is refused (status {status}); {hint}")
    if status not in (200, 206, 416):
        raise InputError(f"{public(url)}: status {status}; check the address")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise InputError(f"{public(url)}: the server compresses what it sends, so byte ranges cannot be trusted")


def _content_range(response: httpx.Response) -> tuple[int, int, int | None]:
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None:
        raise TransientError(f"status {response.status_code} without a usable Content-Range")
    first, last, total = match.groups()
    return int(first or 0), int(last or -1), None if total == "*" else int(total)
