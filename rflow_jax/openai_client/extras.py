"""``extra_body`` and ``extra_headers``: what may be added to requests, checked before any is sent."""

import json
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

from rflow_jax.errors import InputError
from rflow_jax.utils.secrets import looks_secret, require_no_secret

# Fields of a request that have a setting of their own.
_SETTINGS = {
    "model": "model",
    "temperature": "temperature",
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "reasoning_effort": "reasoning_effort",
    "response_format": "structured",
}
# Fields that change what is asked, or the form in which an answer is read.
_OF_QUESTIONS = "questions are made from the prompt files (prompts, template or prompt_file)"
_OF_ANSWERS = "one answer a question is read, whole and as a text"
_FIXED = dict.fromkeys(("messages", "prompt"), _OF_QUESTIONS) | dict.fromkeys(
    (
        *("stream", "stream_options", "n", "best_of", "logprobs", "top_logprobs", "modalities", "audio", "background"),
        *("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"),
    ),
    _OF_ANSWERS,
)
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110
_VALUE = re.compile(r"[!-~](?:[ -~]*[!-~])?")
# The last word of a header's name, but for keys that are none of anybody's.
_OF_SECRETS = re.compile(
    r"(?<![a-z])(?<!idempotency-)(?:(?:api|auth|access)?(?:key|token)|auth(?:orization|entication)?|cookie|credentials?|passw(?:or)?d|secret)\Z",
    re.IGNORECASE,
)
_OF_CONNECTIONS = {
    *("accept-encoding", "connection", "content-encoding", "content-length", "content-type", "transfer-encoding"),
    *("expect", "te", "trailer", "upgrade"),
}
AUTHORIZATION = "Authorization"


def require_body(fields: Mapping[str, Any], settings: Collection[str]) -> None:
    """Checks ``extra_body``.

    Args:
        settings: the names of the settings beside it.

    Raises:
        InputError: a field is one that requests have anyway, holds a secret, or cannot be written as JSON.
    """
    for name in fields:
        if name in _SETTINGS and _SETTINGS[name] in settings:
            raise InputError(f"extra_body.{name}: give it as the setting {_SETTINGS[name]}, and leave it out here")
        if name in _SETTINGS:
            raise InputError(f"extra_body.{name}: is fixed for this kind of question; leave it out")
        if name in _FIXED:
            raise InputError(f"extra_body.{name}: {_FIXED[name]}; leave it out")
    require_no_secret(fields, "extra_body")
    for name, value in fields.items():
        try:
            json.dumps({name: value}, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"extra_body.{name!s:.60}: cannot be sent as JSON; give texts, finite numbers, true, false, null, "
                "lists or sections (a date in quotation marks)"
            ) from error


def require_headers(headers: Mapping[str, str]) -> None:
    """Checks ``extra_headers``, as far as they do not come from the environment.

    Raises:
        InputError: one is no header, stands twice, belongs to the connection, or holds a secret.
    """
    seen: dict[str, str] = {}
    for name, value in headers.items():
        place = f"extra_headers.{name!s:.60}"
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError(f"{place}: the name of a header has letters, digits and -_. alone")
        if not isinstance(value, str):
            raise InputError(f"{place}: give a text, in quotation marks if it is a number")
        if (before := seen.setdefault(name.lower(), name)) != name:
            raise InputError(f"{place}: stands twice, also as {before}; leave one of them out")
        if name.lower() in _OF_CONNECTIONS:
            raise InputError(f"{place}: is set by the client for each request; leave it out")
        if value.startswith("$"):
            if not re.fullmatch(r"[A-Za-z_]\w*", value[1:], re.ASCII):
                raise InputError(f"{place}: after $ give the name of an environment variable, such as $GATEWAY_KEY")
        elif _OF_SECRETS.search(name) or looks_secret(value):  # it would stand in the run's files
            raise InputError(f"{place}: give $ and the name of an environment variable that holds it")
        elif not _VALUE.fullmatch(value):
            raise InputError(f"{place}: its value must be of letters, digits and signs of ASCII, on one line")


def resolved_headers(headers: Mapping[str, str], key_variable: str, key: str | None) -> dict[str, str]:
    """The headers with the values that the environment holds.

    Args:
        key_variable: the environment variable of the API key.
        key: the API key, if there is one; it is sent as ``Authorization``.

    Raises:
        InputError: a variable is not set or cannot be a header, or there are two of ``Authorization``.
    """
    found = {}
    for name, value in headers.items():
        if value.startswith("$"):
            variable, value = value[1:], os.environ.get(value[1:], "").strip()
            if not value:
                raise InputError(f"extra_headers.{name}: the environment variable {variable} is not set, or empty")
            if not _VALUE.fullmatch(value):
                raise InputError(
                    f"extra_headers.{name}: the environment variable {variable} contains characters that no header has"
                )
        if name.lower() == AUTHORIZATION.lower():
            if key is not None:
                raise InputError(
                    f"extra_headers.{name}: the key in {key_variable} is sent as {AUTHORIZATION} too; leave one out "
                    "(api_key_env may name a variable that is not set)"
                )
            name = AUTHORIZATION  # in the client's own writing, so that it takes the place of the client's
        found[name] = value
    return found
