"""Builds requests and parses replies."""

import json
import math
from collections.abc import Mapping
from typing import Any

from rflow_jax.openai_client.accepted import FORMATS, Accepted
from rflow_jax.openai_client.endpoint import Endpoint
from rflow_jax.openai_client.messages import Answer, ChatRequest, UnfitReply, UnusableAnswer, encodable
from rflow_jax.openai_client.usage import Usage
from rflow_jax.utils.file_kinds import web_page
from rflow_jax.utils.shown import one_line

_LONGEST_QUOTE = 80  # characters of what a server said
_MOST_TOKENS = 2**40  # of one answer; more is nonsense


def request(endpoint: Endpoint, question: ChatRequest, accepted: Accepted) -> dict[str, Any]:
    """The fields of a request, as the server accepts them."""
    format = FORMATS[accepted.format]
    fields: dict[str, Any] = {"model": endpoint.model_name, "messages": list(question.messages)}
    if endpoint.temperature is not None:
        fields["temperature"] = endpoint.temperature
    if endpoint.max_tokens is not None:
        fields["max_tokens"] = endpoint.max_tokens
    if question.form and format == "json_object":
        fields["response_format"] = {"type": "json_object"}
    elif question.form and format == "json_schema":
        schema = {"name": question.form.name, "strict": True, "schema": question.form.schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if endpoint.reasoning_effort is not None:
        fields["reasoning_effort"] = endpoint.reasoning_effort
    return accepted.written(fields | dict(question.options))


def read_body(content: bytes) -> Mapping[str, Any]:
    """The reply as an object; raises UnfitReply if it is not one."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        if page := web_page(content):
            raise UnfitReply(
                f"the server's reply is {page}, not a chat completion: of a login, a proxy, or a wrong base_url"
            ) from error
        why = f"{error}: {_beginning(content)}" if content.strip() else "it is empty"
        raise UnfitReply(f"the server's reply is not a chat completion ({why})") from error
    if not isinstance(body, dict):
        raise UnfitReply(f"the server's reply is not a chat completion: {_beginning(content)}")
    return body


def _beginning(content: bytes) -> str:
    return one_line(content[: 4 * _LONGEST_QUOTE].decode("utf-8", "replace"), _LONGEST_QUOTE)


def read_usage(body: Mapping[str, Any], endpoint: Endpoint) -> Usage:
    """The usage that a reply reports."""
    counts = body.get("usage")
    counts = counts if isinstance(counts, dict) else {}
    read, written = counts.get("prompt_tokens"), counts.get("completion_tokens")
    if not (isinstance(read, int) and isinstance(written, int)):
        return Usage(unmetered=1)
    if not (0 <= read <= _MOST_TOKENS and 0 <= written <= _MOST_TOKENS):
        return Usage(unmetered=1)
    return Usage(prompt_tokens=read, completion_tokens=written, cost=endpoint.cost(read, written))


def read_error(body: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]] | None:
    """The status and the error that a gateway puts into a reply in place of the answer; None if there is none."""
    choices = body.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    error = body.get("error") or first.get("error")
    if not error and first.get("finish_reason") != "error":
        return None
    error = error or "the server ended the answer with an error"
    error = error if isinstance(error, dict) else {"message": str(error)}
    code = str(error.get("code") or error.get("status") or "")
    return (int(code) if code.isascii() and code.isdigit() and 400 <= int(code[:4]) < 600 else 500), error


def read_answer(body: Mapping[str, Any]) -> Answer:
    """The model's answer in a reply.

    Raises:
        UnusableAnswer: the model refused, or the reply is not a chat completion.
    """
    try:
        choice = body["choices"][0]
        message, ended = choice["message"], choice.get("finish_reason")
        text, refusal = _joined(message.get("content")), message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        words = body.get("message") or body.get("detail") or json.dumps(body)
        raise UnfitReply(
            f"the server's reply is not a chat completion: it has no message ({one_line(words, _LONGEST_QUOTE)})"
        ) from error
    if refusal or ended == "content_filter":
        raise UnusableAnswer(f"the model refused: {refusal or 'its content filter struck'}")
    if not isinstance(text, str):
        raise UnfitReply("the server's reply is not a chat completion: its content is not text")
    tokens, cut = _first_tokens(choice), ended == "length"
    if not (text.strip() or tokens or cut):
        _require_no_other(message)
    return Answer(encodable(text), cut=cut, tokens=tokens)


def _joined(content: Any) -> Any:
    """The text of a message's content; of a list of parts the texts alone, not the thoughts."""
    if not isinstance(content, list):
        return content or ""
    parts = [part for part in content if isinstance(part, str | dict)]
    return "".join(
        part if isinstance(part, str) else str(part.get("text") or "")
        for part in parts
        if isinstance(part, str) or part.get("type") in ("text", "output_text")
    )


def _require_no_other(message: Mapping[str, Any]) -> None:
    """Raises UnusableAnswer, with the reason, if a message without a text has something else."""
    if message.get("tool_calls") or message.get("function_call"):
        raise UnusableAnswer("the model calls a tool and gives no answer")
    if message.get("reasoning_content") or message.get("reasoning") or isinstance(message.get("content"), list):
        raise UnusableAnswer("the model wrote thoughts and no answer")


def _first_tokens(choice: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    try:
        first = choice["logprobs"]["content"][0]
        entries = [first, *(first.get("top_logprobs") or ())]  # the chosen one need not be among the likeliest
        found = {entry.get("token"): entry.get("logprob") for entry in entries}
    except (KeyError, IndexError, TypeError, AttributeError):
        return ()
    return tuple(
        (token, float(value))
        for token, value in found.items()
        if isinstance(token, str) and isinstance(value, int | float) and math.isfinite(value)
    )
