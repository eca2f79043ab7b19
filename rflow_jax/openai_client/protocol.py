"""Builds requests and parses replies."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from rflow_jax.openai_client.endpoint import Endpoint
from rflow_jax.openai_client.messages import Answer, ChatRequest, UnusableAnswer, encodable
from rflow_jax.openai_client.usage import Usage

FORMATS = ("json_schema", "json_object", "text")
"""Ways to ask for JSON, from strict to loose."""

_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


def request(endpoint: Endpoint, question: ChatRequest, format: str) -> dict[str, Any]:
    """The fields of a request; ``format`` is one of ``FORMATS``."""
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
    return fields | dict(question.options)


def read_body(content: bytes) -> Mapping[str, Any]:
    """The reply as an object; raises UnusableAnswer if it is not one."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UnusableAnswer(f"the server's reply is not a chat completion ({error})") from error
    if not isinstance(body, dict):
        raise UnusableAnswer("the server's reply is not a chat completion")
    return body


def read_usage(body: Mapping[str, Any], endpoint: Endpoint) -> Usage:
    """The usage that a reply reports."""
    counts = body.get("usage")
    counts = counts if isinstance(counts, dict) else {}
    read, written = counts.get("prompt_tokens"), counts.get("completion_tokens")
    if not (isinstance(read, int) and isinstance(written, int) and read >= 0 and written >= 0):
        return Usage(unmetered=1)
    return Usage(prompt_tokens=read, completion_tokens=written, cost=endpoint.cost(read, written))


def read_answer(body: Mapping[str, Any]) -> Answer:
    """The model's answer in a reply.

    Raises:
        UnusableAnswer: the model refused, or the reply is not a chat completion.
    """
    try:
        choice = body["choices"][0]
        message, ended = choice["message"], choice.get("finish_reason")
        text, refusal = message.get("content") or "", message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UnusableAnswer("the server's reply is not a chat completion: it has no message") from error
    if refusal or ended == "content_filter":
        raise UnusableAnswer(f"the model refused: {refusal or 'its content filter struck'}")
    if not isinstance(text, str):
        raise UnusableAnswer("the server's reply is not a chat completion: its content is not text")
    return Answer(_THOUGHTS.sub("", encodable(text)), cut=ended == "length", tokens=_first_tokens(choice))


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
