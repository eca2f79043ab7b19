"""Secrets in the wrong place: recognised by the name of a setting or by their own look, and not repeated."""

import os
import re
from collections.abc import Mapping
from typing import Any

from rflow_jax.errors import InputError

HIDDEN = "***"
_SHOWN = 4  # characters of a secret that say which one it is
_NAME = re.compile(
    r"api[_-]?key|secret|passw(?:or)?d|passphrase|credential|authorization|\A(?:access|private)[_-]?key"
    r"|\A(?:(?:access|api|auth|bearer|hf|id|refresh|session)[_-]?)?(?:bearer|auth|token)\Z",
    re.IGNORECASE,
)
_HOLDER = re.compile(r"(?:_|-)(?:env|file|path|name|variable)\Z", re.IGNORECASE)  # where it is, not what it is
_LOOK = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:sk|pk|rk)[-_][\w-]{16,}|(?:gsk|hf|xai|r8|pplx|fw|nvapi|tgp|csk|glpat|ghp|gho|ghs)[-_][\w-]{16,}"
    r"|github_pat_\w{20,}|AIza[\w-]{30,}|(?:AKIA|ASIA)[A-Z0-9]{16}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"
    r"|(?<=Bearer )[\w.~+/-]{12,})"
)
_VARIABLE = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD)\Z")
_LEAST = 12  # characters; a shorter value of the environment may be any word
# Quotation marks end an address, unless it goes on behind them.
_INSIDE = r"(?:[^\s'\"]|['\"](?=[\w%&=~+-]))*"
_ADDRESS = re.compile(
    rf"\b([a-z][a-z0-9+.-]*://)(?:[^/\s]*@)?([^\s'\"?#]*)((?:\?{_INSIDE})?)(#{_INSIDE})?", re.IGNORECASE
)

_LOGIN = re.compile(r"\A([a-z][a-z0-9+.-]*://)[^/]*@", re.IGNORECASE)  # of a value that is an address, with any letters


def looks_secret(text: str) -> bool:
    """Whether a text contains what looks like a key or a token."""
    return _LOOK.search(text) is not None


def without_secrets(text: str) -> str:
    """A message for all to see: its addresses are public, and of keys and tokens only the first characters are left."""
    text = public_addresses(text)
    for name, value in os.environ.items():
        if _VARIABLE.search(name) and len(value) >= _LEAST:
            text = text.replace(value, value[:_SHOWN] + HIDDEN)
    return _LOOK.sub(lambda found: found[0][:_SHOWN] + HIDDEN, text)


def require_no_secret(value: Any, place: str, name: str = "") -> None:
    """Raises InputError if a part of a setting holds a secret, which would stand in a run's files.

    ``$NAME``, the name of a variable of the environment, is none.
    """
    if isinstance(value, Mapping):
        for key, part in value.items():
            require_no_secret(part, f"{place}.{key}", str(key))
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            require_no_secret(part, f"{place}[{number}]", name)
    elif isinstance(value, str) and not value.startswith("$"):
        named = _NAME.search(name) and not _HOLDER.search(name)
        if value and (named or looks_secret(value)):
            raise InputError(
                f"{place}: a key or password would stand in the run's files; put it into a variable of the environment "
                "and name that in api_key_env, or here as $NAME for a class of your own to read"
            )


def public_addresses(value: Any) -> Any:
    """A configuration, or a text of it, without what may be secret in its addresses: user, password and query."""
    if isinstance(value, Mapping):
        return {key: public_addresses(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(public_addresses(part) for part in value)
    return _ADDRESS.sub(_public, _LOGIN.sub(r"\1", value)) if isinstance(value, str) else value


def _public(found: re.Match[str]) -> str:
    scheme, rest, query, fragment = found.groups("")
    return scheme + rest + ("" if scheme.lower() in ("http://", "https://") else query + fragment)
