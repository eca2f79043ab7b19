"""Answers of the local OpenAI-compatible server, which follow from the request alone."""

import argparse
import base64
import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args


@dataclass(frozen=True)
class Call:
    """One request as the server saw it.

    Attributes:
        number: how many came before it.
        body: the fields of the request.
        authorization: that header.
        attempt: how often a request with the same body came before it.
        query: of the address.
    """

    number: int
    body: Mapping[str, Any] = field(repr=False)
    authorization: str
    attempt: int = 0
    query: str = ""

    @property
    def model(self) -> str:
        """The model that was asked for."""
        return self.body["model"]

    @cached_property
    def parts(self) -> list[tuple[str, str | bytes]]:
        """The texts and the images of all messages in order: ("text", text) or ("image", bytes)."""
        parts: list[tuple[str, str | bytes]] = []
        for message in self.body["messages"]:
            content = message["content"]
            listed: list[Any] = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in listed:
                if part["type"] == "text":
                    parts.append(("text", part["text"]))
                else:
                    parts.append(("image", base64.b64decode(part["image_url"]["url"].partition("base64,")[2])))
        return parts

    @property
    def text(self) -> str:
        """All texts, a line each."""
        return "\n".join(str(part) for kind, part in self.parts if kind == "text")

    @property
    def images(self) -> list[bytes]:
        """All images; the one in hand is the last."""
        return [part for kind, part in self.parts if kind == "image" and isinstance(part, bytes)]

    @property
    def image(self) -> bytes:
        """The image in hand."""
        return self.images[-1] if self.images else b""

    @property
    def format(self) -> str:
        """How JSON was asked for: json_schema, json_object or text."""
        return self.body.get("response_format", {}).get("type", "text")

    @property
    def schema(self) -> Mapping[str, Any] | None:
        """The JSON schema of the answer."""
        return self.body.get("response_format", {}).get("json_schema", {}).get("schema")

    @property
    def form(self) -> Any:
        """The JSON object that the instructions show, with 0 for every ``<blank>``."""
        system = next((m["content"] for m in self.body["messages"] if m["role"] == "system"), "")
        shown = re.sub(r"<[^<>]*>", "0", system) if "JSON" in system else ""
        start = shown.find("{")
        return json.JSONDecoder().raw_decode(shown, start)[0] if start >= 0 else None

    @property
    def decides(self) -> bool:
        """Whether log-probabilities are wanted."""
        return bool(self.body.get("logprobs"))

    @property
    def role(self) -> Literal["verify", "write"]:
        """Who asks: "verify" for grades and decisions, else "write"."""
        return "verify" if self.schema or self.decides or self.form else "write"

    @cached_property
    def digest(self) -> str:
        """A hash of the request."""
        return hashlib.sha256(json.dumps(self.body, sort_keys=True).encode()).hexdigest()


def score_of(image: bytes) -> float:
    """The score that every grader's question about these bytes gets: 0 to 10 in steps of 0.001."""
    return int(hashlib.sha256(image).hexdigest()[:8], 16) % 10001 / 1000


def sentence_of(image: bytes, text: str) -> str:
    """The text that every other question with these bytes and words gets."""
    digest = hashlib.sha256(image + text.encode()).hexdigest()
    sides = ("left", "right", "top", "bottom")
    return f"Clear up the {sides[int(digest[0], 16) % 4]}, {digest[:6]}."


def decision_of(image: bytes) -> tuple[str, float]:
    """The word that a yes/no question about these bytes gets, and its log-probability."""
    yes = (score_of(image) + 0.5) / 11
    return ("yes", math.log(0.9 * yes)) if yes > 0.5 else ("no", math.log(0.9 * (1 - yes)))


def first_tokens(image: bytes) -> dict[str, float]:
    """The first tokens with their log-probabilities: several ways to write each word, and others."""
    yes = 0.9 * (score_of(image) + 0.5) / 11
    ways = {"Yes": 0.6 * yes, " yes": 0.3 * yes, "YES": 0.1 * yes}
    ways |= {"No": 0.7 * (0.9 - yes), "no": 0.3 * (0.9 - yes), "Maybe": 0.06, "The": 0.04}
    return {token: math.log(share) for token, share in sorted(ways.items(), key=lambda way: -way[1])}


def answer_to(call: Call) -> str:
    """The text of the answer to a call."""
    if call.decides:
        return next(iter(first_tokens(call.image)))
    number = score_of(call.image)
    if call.schema is not None:
        return json.dumps(_fill(call.schema, call.schema, number))
    if call.form is not None:
        return f"Here are my grades:\n```json\n{json.dumps(_fill_form(call.form, number), indent=1)}\n```"
    return sentence_of(call.image, call.text)


def completion(
    call: Call, content: str | None, refusal: str | None = None, ended: str = "stop", tokens: Mapping[str, float] = {}
) -> dict[str, Any]:
    """The reply around an answer."""
    message = {"role": "assistant", "content": content, "refusal": refusal}
    top = [{"token": token, "logprob": value, "bytes": list(token.encode())} for token, value in tokens.items()]
    return {
        "id": f"chatcmpl-{call.number}",
        "object": "chat.completion",
        "created": 0,
        "model": call.model,
        "choices": [
            {
                "index": 0,
                "message": message,
                "finish_reason": ended,
                "logprobs": {"content": [top[0] | {"top_logprobs": top}]} if top else None,
            }
        ],
        "usage": usage_of(call, content),
    }


def usage_of(call: Call, content: str | None) -> dict[str, int]:
    """Tokens of a request and its answer: a quarter of the letters, and 85 an image."""
    read, written = len(call.text) // 4 + 85 * len(call.images), len(content or "") // 4 + 1
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _fill(schema: Mapping[str, Any], root: Mapping[str, Any], number: float) -> Any:
    """A value that fits a JSON schema of the kind that strict answers use."""
    if "$ref" in schema:
        target: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        return _fill(target, root, number)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][int(number * 1000) % len(schema["enum"])]
    if "anyOf" in schema:
        return _fill(schema["anyOf"][0], root, number)
    match schema["type"]:
        case "object":
            return {name: _fill(inner, root, number) for name, inner in schema["properties"].items()}
        case "array":
            return [_fill(schema["items"], root, number)] * max(1, schema.get("minItems", 1))
        case "number":
            return number
        case "integer":
            return round(number)
        case "boolean":
            return number >= 5
        case "null":
            return None
    return f"seen in a picture worth {number}"


def _fill_form(form: Any, number: float) -> Any:
    if isinstance(form, dict):
        return {name: _fill_form(inner, number) for name, inner in form.items()}
    return f"seen in a picture worth {number}" if isinstance(form, str) else number


FaultKind = Literal[
    "delay", "reorder", "status", "drop", "truncated", "cut_body", "half_body", "refusal", "empty", "off_schema",
    "no_logprobs",
]  # fmt: skip
STATUSES = (408, 409, 429, 500, 502, 503)


@dataclass
class Fault:
    """A fault that the server injects.

    Attributes:
        kind: delay (answers late), reorder (the earlier a request came, the later its answer), status (an HTTP
            error), drop (the connection closes without an answer), truncated (the answer itself is cut),
            cut_body (the HTTP body is cut JSON), half_body (the connection closes in the middle of the body), refusal,
            empty, off_schema (an answer that lacks everything), no_logprobs.
        when: which calls it hits.
        times: how often it strikes; None: always.
        seconds: of a delay, or between two reordered answers.
        status: HTTP status.
        retry_after: value of the Retry-After header.
        message: what the server says about an HTTP error; ``{key}`` stands for the client's key.
    """

    kind: FaultKind
    when: Callable[[Call], bool] = lambda call: True
    times: int | None = None
    seconds: float = 0.05
    status: int = 500
    retry_after: int | float | str | None = None
    message: str = "out of order, key {key}"
    struck: int = field(default=0, init=False)


@dataclass(frozen=True)
class Chaos:
    """A share of the requests fails, spread over every kind of failure.

    Which ones, and how, follows from the seed, the request and how often it came before: never from timing.

    Attributes:
        rate: share of the requests that fail.
        seed: another one picks others.
        hang: seconds that a server which keeps its client waiting needs; longer than the client's time limit.
    """

    rate: float = 0.1
    seed: int = 0
    hang: float = 30.0

    def fault_for(self, call: Call) -> Fault | None:
        """What goes wrong with this request, if anything."""
        name = f"{self.seed} {call.digest} {call.attempt}"
        drawn = random.Random(hashlib.sha256(name.encode()).digest())
        return drawn.choice(self._kinds(call)) if drawn.random() < self.rate else None

    def _kinds(self, call: Call) -> list[Fault]:
        kinds = [Fault("status", status=status) for status in STATUSES if status != 429]
        kinds += [Fault("status", status=429, retry_after=0.2), Fault("delay", seconds=self.hang)]
        kinds += [Fault("drop"), Fault("half_body"), Fault("cut_body"), Fault("truncated"), Fault("refusal")]
        kinds += [Fault("empty")]
        return kinds + [Fault("off_schema")] * (call.role == "verify")  # a free text has no schema


def parse_fault(text: str) -> Fault:
    """``KIND[=NUMBER][:TIMES]``; the number is the status, or the seconds of a delay."""
    head, _, times = text.partition(":")
    kind, _, number = head.partition("=")
    if kind not in get_args(FaultKind):
        raise argparse.ArgumentTypeError(f"unknown fault {kind}: one of {', '.join(get_args(FaultKind))}")
    fault = Fault(kind, times=int(times) if times else None)  # pyright: ignore[reportArgumentType]
    if number and kind == "status":
        fault.status = int(number)
    elif number:
        fault.seconds = float(number)
    return fault
