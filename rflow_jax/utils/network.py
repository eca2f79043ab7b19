"""Proxies and certificates that the environment names: checked before they are used."""

import ipaddress
import os
import ssl
from importlib.util import find_spec
from urllib.parse import urlsplit

from rflow_jax.errors import InputError

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
