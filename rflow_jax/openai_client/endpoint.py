"""The settings of an endpoint, and the removal of its secrets from texts, also if a server repeats them."""

import base64
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

from rflow_jax.errors import InputError
from rflow_jax.openai_client.extras import require_body, require_headers, resolved_headers
from rflow_jax.utils.ranges import Concurrency, Price, Retries, Seconds, Temperature, Timeout, Tokens, require_ranges
from rflow_jax.utils.registry import EXECUTION, LATER
from rflow_jax.utils.secrets import HIDDEN, looks_secret, public_addresses

_VERSION = re.compile(r"version\Z", re.IGNORECASE)  # which is no secret, and often what is to be mended
_MASKED = re.compile(r"\*\*|\.\.\.|…")
_PART = 8  # this many consecutive characters of a key are no coincidence
_MASKED_PART = 3
_SHORTEST = 8  # a shorter key is no protection, and words of an answer may look like it
_LONGEST_WORD = 16  # a key of fewer letters and nothing else is a placeholder, which answers may use as a word


class Secrets:
    """The API key, the user, password and query of the address, and further words unless they are short."""

    def __init__(self, key: str, address: str | None, more: Iterable[str] = ()) -> None:
        parts = urlsplit(address or "")
        pairs = (pair.partition("=") for pair in parts.query.split("&"))
        query = (value or name for name, _, value in pairs if not _VERSION.search(name))
        inside = {parts.password or parts.username or "", *query}
        inside |= {unquote(part) for part in inside}
        inside |= {quote(part, safe="") for part in inside}
        login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"  # as it is sent
        basic = base64.b64encode(login.encode()).decode("ascii") if parts.username or parts.password else ""
        long = (word for word in more if len(word) >= _SHORTEST)
        held = {key, *long, *inside, basic} - {"", NO_KEY}
        self._secrets = sorted(held, key=len, reverse=True)

    def blank(self, text: str) -> str:
        """An answer with whole secrets masked."""
        for secret in self._secrets:
            if len(secret) >= _SHORTEST and not (secret.isalpha() and len(secret) < _LONGEST_WORD):
                text = text.replace(secret, HIDDEN)
        return text

    def hide(self, text: str) -> str:
        """An error's text with all words masked that contain a secret or a part of one.

        Servers often repeat the refused key, with stars in its middle. A key of few characters is hidden where it is a
        word of its own, and a placeholder of one to three not at all.
        """
        words = re.split(r"(\s+)", public_addresses(text))
        return "".join(HIDDEN if self._reveals(word) else word for word in words)

    def _reveals(self, word: str) -> bool:
        for secret in self._secrets:
            if len(secret) < _SHORTEST:
                if len(secret) > _MASKED_PART and secret in re.split(r"[^\w-]+", word):
                    return True
                continue
            window = min(_MASKED_PART if _MASKED.search(word) else _PART, len(secret))
            if any(secret[start : start + window] in word for start in range(len(secret) - window + 1)):
                return True
        return False


DEFAULT_MODEL = "gpt-4o"
OPENAI = "https://api.openai.com/v1"
NO_KEY = "none"  # for a server without a key; the client library insists on one
STRUCTURED = ("auto", "json_schema", "json_object", "text")


@dataclass(frozen=True)
class Connection:
    """The address, key, limits and prices of a chat endpoint.

    Attributes:
        base_url: address of an OpenAI-compatible API; null takes OPENAI_BASE_URL, then OpenAI's own.
        model: name of the model; null takes OPENAI_MODEL, then gpt-4o.
        api_key_env: name of the environment variable that holds the key (never the key itself).
        timeout: seconds to wait for one answer.
        concurrency: requests in flight at once.
        max_retries: further attempts after a timeout, a broken connection, a busy or failing server, and
            after an answer that cannot be used.
        patience: seconds for which the server may be away before the run ends; it goes on when it is back.
        price_input: USD per million tokens read; null: the cost is not known (a server of your own costs 0).
        price_output: USD per million tokens written.
        reasoning_effort: how long a model thinks (low, medium, high, or what the server knows); null leaves it to it.
        extra_body: further fields of each request, such as ``{top_k: 20}``.
        extra_headers: further HTTP headers; a value ``$NAME`` is taken from the environment.
    """

    base_url: str | None = field(default=None, repr=False, metadata=EXECUTION)  # it may hold a password
    model: str | None = None
    api_key_env: str = field(default="OPENAI_API_KEY", metadata=EXECUTION)
    timeout: Timeout = field(default=60.0, metadata=EXECUTION)
    concurrency: Concurrency = field(default=8, metadata=EXECUTION)
    max_retries: Retries = field(default=5, metadata=EXECUTION)
    patience: Seconds = field(default=600.0, metadata=EXECUTION | LATER)
    price_input: Price | None = field(default=None, metadata=EXECUTION)
    price_output: Price | None = field(default=None, metadata=EXECUTION)
    reasoning_effort: str | None = field(default=None, metadata=LATER)
    extra_body: dict[str, Any] = field(default_factory=dict, repr=False, metadata=LATER)
    extra_headers: dict[str, str] = field(default_factory=dict, repr=False, metadata=EXECUTION | LATER)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.api_key_env):
            # The value is not repeated: it may be a key pasted into the wrong place.
            raise InputError("api_key_env must be the name of an environment variable, such as OPENAI_API_KEY")
        if self.base_url is not None:
            _require_address(self.base_url, "base_url")
        _require_model(self.model or "", "model")
        require_body(self.extra_body, {one.name for one in fields(self)})
        require_headers(self.extra_headers)
        require_ranges(self)
        if (self.price_input is None) != (self.price_output is None):
            raise InputError("give both price_input and price_output, or neither; 0 is a price")

    @property
    def model_name(self) -> str:
        """The model's name: from the config, else from the environment, else gpt-4o."""
        named = os.environ.get("OPENAI_MODEL") or DEFAULT_MODEL
        return self.model or _require_model(named, "the environment variable OPENAI_MODEL")

    def address(self) -> str | None:
        """The base URL: from the config, else from the environment, where it is checked; None is OpenAI's own."""
        if self.base_url:
            return self.base_url
        address = os.environ.get("OPENAI_BASE_URL") or None
        if address:
            _require_address(address, "the environment variable OPENAI_BASE_URL")
        return address

    def api_key(self) -> str:
        """The key from the environment; a local server needs none.

        Raises:
            InputError: no key, and the address is OpenAI's own; or the value cannot be a key.
        """
        key = os.environ.get(self.api_key_env, "").strip()
        if key and not re.fullmatch(r"[!-~]+", key):
            raise InputError(f"the environment variable {self.api_key_env} contains characters that no key has")
        if key:
            return key
        if self.address() or any(name.lower() == "authorization" for name in self.extra_headers):
            return NO_KEY
        raise InputError(f"no API key: set the environment variable {self.api_key_env}, or base_url to a local server")

    def headers(self) -> dict[str, str]:
        """The further HTTP headers, with the values that the environment holds.

        Raises:
            InputError: a variable is not set or cannot be a header, or the API key is sent as one of them.
        """
        key = os.environ.get(self.api_key_env, "").strip() or None
        return resolved_headers(self.extra_headers, self.api_key_env, key)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """USD for these tokens read and written; None if the prices are unknown."""
        if self.price_input is None or self.price_output is None:
            return None
        return (prompt_tokens * self.price_input + completion_tokens * self.price_output) / 1e6

    def endpoint(self) -> "Endpoint":
        """The endpoint for a client; what these settings leave open is at its default."""
        known = [one.name for one in fields(Endpoint) if hasattr(self, one.name)]
        return Endpoint(**{name: getattr(self, name) for name in known})


@dataclass(frozen=True)
class Endpoint(Connection):
    """A chat endpoint and the settings of its requests.

    Attributes:
        temperature: sampling temperature; null leaves it to the server.
        max_tokens: longest answer in tokens; null leaves it to the server.
        structured: how the server is asked for JSON: json_schema, json_object, text (in words only), or auto, which
            begins with json_schema and takes the next one when the server refuses.
    """

    temperature: Temperature | None = None
    max_tokens: Tokens | None = None
    structured: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.structured not in STRUCTURED:
            raise InputError(f"structured is {self.structured!r}: give one of {', '.join(STRUCTURED)}")


def without_query(url: str) -> tuple[str, dict[str, str]]:
    """An address, and its query apart, which belongs behind the path of a request; the fragment is left out."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc, parts.path, "", "")), dict(parse_qsl(parts.query, True))


def public_url(url: str) -> str:
    """An address without its secret parts: user, password and query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _require_model(name: str, what: str) -> str:
    if looks_secret(name):  # a key in the wrong place, which messages and records would repeat
        raise InputError(f"{what} looks like a key: give the name of a model; a key belongs into OPENAI_API_KEY")
    return name


def _require_address(url: str, what: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        usable = usable and url.isprintable() and " " not in url
    except ValueError:
        usable = False
    if not usable:
        raise InputError(f"{what} must be an address such as http://localhost:8000/v1")
