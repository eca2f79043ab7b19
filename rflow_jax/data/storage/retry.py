"""Time-outs, and retries with exponential, jittered back-off."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from rflow_jax.errors import InputError
from rflow_jax.utils.network import printable
from rflow_jax.utils.ranges import Retries, Seconds, Timeout, require_ranges
from rflow_jax.utils.secrets import public_addresses

if TYPE_CHECKING:
    import tenacity

T = TypeVar("T")

SLOWEST = 64 * 1024  # bytes per second; a transfer slower than this for a whole time-out is retried
LONGEST_RETRY_AFTER = 300.0


@dataclass(frozen=True)
class RetryPolicy:
    """Timeouts and retries of requests to a server.

    Attributes:
        timeout: seconds without a byte, and the seconds by which an answer may lag behind 64 KiB/s.
        max_retries: further attempts after a time-out, a broken connection, or a busy or failing server.
        max_backoff: seconds between two attempts, at most (unless the server asks for more).
    """

    timeout: Timeout = 30.0
    max_retries: Retries = 6
    max_backoff: Seconds = 20.0

    def __post_init__(self) -> None:
        require_ranges(self, "retry")


class TransientError(Exception):
    """A failed attempt; another may succeed."""

    def __init__(self, reason: str, retry_after: float = 0.0):
        super().__init__(reason)
        self.retry_after = retry_after


def is_http(url: str) -> bool:
    """Whether a file is fetched over HTTP: http(s) addresses and those of the Hub."""
    return url.startswith(("http://", "https://", "hf://"))


def public(url: str) -> str:
    """An address without what may be secret in it: user, password and query."""
    return re.sub(r"(?<=://)[^/]*@", "", re.split("[?#]", url)[0]) if is_http(url) else public_addresses(url)


def with_retries(attempt: Callable[[], T], url: str, retry: RetryPolicy) -> T:
    """The result of ``attempt``, which is called again after each :class:`TransientError`.

    Raises:
        InputError: it never succeeded.
    """
    import tenacity

    jitter = tenacity.wait_random_exponential(multiplier=0.5, max=retry.max_backoff)

    def pause(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return max(jitter(state), min(getattr(error, "retry_after", 0.0), LONGEST_RETRY_AFTER))

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(retry.max_retries + 1),
        wait=pause,
        retry=tenacity.retry_if_exception_type(TransientError),
        reraise=True,
    )
    try:
        return retrying(attempt)
    except TransientError as error:
        reason = f"{public_addresses(printable(str(error)))} ({retry.max_retries + 1} attempts)"
        raise InputError(f"{public(url)}: {reason}; check the address and the network, or raise max_retries") from error


def enforce_min_throughput(chunks: Iterable[bytes], timeout: float) -> Iterator[bytes]:
    """The chunks, as long as they come fast enough; the consumer's own time does not count.

    Raises:
        TransientError: the sender lags ``timeout`` seconds behind the lowest speed allowed.
    """
    waited, got, source = 0.0, 0, iter(chunks)
    while True:
        began = time.monotonic()
        chunk = next(source, None)
        waited += time.monotonic() - began
        if chunk is None:
            return
        got += len(chunk)
        if waited > timeout + got / SLOWEST:
            raise TransientError(f"too slow: {got} bytes in {waited:.0f} s")
        yield chunk
