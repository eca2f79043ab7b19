"""What the environment and servers say about a connection: checked before it is used, waited for or printed."""

import ipaddress
import math
import os
import re
import ssl
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from urllib.parse import urlsplit

from rflow_jax.errors import InputError

_LONGEST_WORDS = 20_000
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\^_])|\x9b[0-?]*[ -/]*[@-~]")
_PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")


def require_usable_network() -> None:
    """Raises InputError, with its name, if a variable of the environment is no usable proxy or certificate file."""
    for name in (*_PROXIES, *(name.lower() for name in _PROXIES)):
        if value := os.environ.get(name):
            _require_proxy(name, value)
    if path := os.environ.get("SSL_CERT_FILE"):
        try:
            ssl.create_default_context(cafile=path)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise InputError("the environment variable SSL_CERT_FILE names no usable file of certificates") from error


def _require_proxy(name: str, value: str) -> None:
    # The value is not repeated: it may hold a password.
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    else:
        usable = usable and parts.scheme in ("http", "https", "socks5", "socks5h")
        if usable and parts.scheme.startswith("socks") and find_spec("socksio") is None:
            raise InputError(f"the environment variable {name} names a SOCKS proxy: install httpx[socks], or unset it")
    if not usable:
        raise InputError(f"the environment variable {name} must be a proxy such as http://host:3128; mend or unset it")


def is_loopback(url: str) -> bool:
    """Whether an address is of this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def uses_environment(url: str | None) -> bool:
    """Whether proxies and certificates of the environment count for an address: for all but this machine's own.

    Args:
        url: None for one elsewhere.

    Raises:
        InputError: they count, and cannot be used.
    """
    if url is not None and is_loopback(url):
        return False
    require_usable_network()
    return True


def asked_pause(headers: Mapping[str, str], longest: float) -> float:
    """Seconds that a server asks to wait, given as a number or date, at most ``longest``; 0 if absent or invalid."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * scale
        except ValueError:
            seconds = _until(headers.get(name, ""))
        if math.isfinite(seconds) and seconds > 0:
            return min(seconds, longest)
    return 0.0


def _until(date: str) -> float:
    try:
        return parsedate_to_datetime(date).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return 0.0


def printable(text: str) -> str:
    """Foreign words in one line of bounded length, without escape sequences and control characters."""
    text = _ESCAPES.sub("", text[:_LONGEST_WORDS])
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
