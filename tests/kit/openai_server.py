"""A real HTTP server on the loopback that answers chat completions the way OpenAI's API does.

Answers follow from the request alone: a question with a JSON schema gets an object that fits it, in which every
number is ``score_of`` the image's bytes; any other question gets a sentence made from a hash of image and text.

``python -m tests.kit.openai_server -- COMMAND...`` runs a command with OPENAI_BASE_URL and OPENAI_API_KEY set to a
server of its own and returns the command's exit status; ``--port N`` alone just serves.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Literal, Self

KEY = "sk-local-server-key"
FaultKind = Literal["delay", "reorder", "status", "drop", "truncated", "cut_body", "refusal", "off_schema"]


@dataclass(frozen=True)
class Call:
    """One request as the server saw it."""

    number: int
    model: str
    text: str
    image: bytes
    schema: Mapping[str, Any] | None
    authorization: str

    @property
    def role(self) -> str:
        """ "verify" for a question with a schema, else "write"."""
        return "verify" if self.schema else "write"


@dataclass
class Fault:
    """Something that goes wrong.

    Attributes:
        kind: delay (answers late), reorder (the earlier a request came, the later its answer), status (an HTTP
            error), drop (the connection closes without an answer), truncated (the JSON inside the answer is cut),
            cut_body (the HTTP body itself is cut JSON), refusal, off_schema (valid JSON that lacks everything).
        when: which calls it hits.
        times: how often it strikes; None: always.
        seconds: of a delay, or between two reordered answers.
        status: HTTP status.
        retry_after: value of the Retry-After header.
    """

    kind: FaultKind
    when: Callable[[Call], bool] = lambda call: True
    times: int | None = None
    seconds: float = 0.05
    status: int = 500
    retry_after: float | None = None
    struck: int = field(default=0, init=False)


class OpenAIServer:
    """The server; a context manager that serves in threads of this process."""

    def __init__(self, faults: Sequence[Fault] = (), port: int = 0) -> None:
        self.faults = list(faults)
        self.calls: list[Call] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"kit": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._http.daemon_threads = True

    @property
    def base_url(self) -> str:
        """The address to give to clients."""
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    @property
    def environment(self) -> dict[str, str]:
        """What a child process needs to find the server."""
        return {"OPENAI_BASE_URL": self.base_url, "OPENAI_API_KEY": KEY}

    def serve(self) -> None:
        """Serves until the process ends."""
        self._http.serve_forever()

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def log(self, call: Call) -> Call:
        """Numbers a call and remembers it."""
        with self._lock:
            call = Call(len(self.calls), call.model, call.text, call.image, call.schema, call.authorization)
            self.calls.append(call)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            return call

    def answered(self) -> None:
        """One call less is being answered."""
        with self._lock:
            self._at_once -= 1

    def faults_for(self, call: Call) -> list[Fault]:
        """The faults that hit this call; each counts as struck."""
        with self._lock:
            hits = [f for f in self.faults if (f.times is None or f.struck < f.times) and f.when(call)]
            for fault in hits:
                fault.struck += 1
            return hits


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    kit: ClassVar[OpenAIServer]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.path.endswith("/chat/completions"):
            return self._send(404, b'{"error": {"message": "no such path"}}')
        call = self.kit.log(_read_call(body, self.headers.get("Authorization", "")))
        try:
            self._answer(call)
        finally:
            self.kit.answered()

    def _answer(self, call: Call) -> None:
        faults = {fault.kind: fault for fault in self.kit.faults_for(call)}
        if "delay" in faults:
            time.sleep(faults["delay"].seconds)
        if "reorder" in faults:
            time.sleep(max(0.0, 8 - call.number % 8) * faults["reorder"].seconds)
        if "drop" in faults:
            self.close_connection = True
            return
        if "status" in faults:
            fault = faults["status"]
            extra = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            message = f"status {fault.status} for key {call.authorization.removeprefix('Bearer ')}"
            return self._send(fault.status, json.dumps({"error": {"message": message}}).encode(), extra)
        content: str | None = answer_to(call)
        refusal = None
        if "truncated" in faults:
            content = content[: len(content) // 2]
        if "off_schema" in faults:
            content = "{}"
        if "refusal" in faults:
            content, refusal = None, "I cannot help with that."
        reply = json.dumps(_completion(call, content, refusal)).encode()
        self._send(200, reply[: len(reply) // 2] if "cut_body" in faults else reply)

    def _send(self, status: int, body: bytes, extra: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(extra or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client gave up waiting
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def score_of(image: bytes) -> float:
    """The score that every grader's question about these bytes gets: 0 to 10 in steps of 0.001."""
    return int(hashlib.sha256(image).hexdigest()[:8], 16) % 10001 / 1000


def sentence_of(image: bytes, text: str) -> str:
    """The text that every other question with these bytes and words gets."""
    digest = hashlib.sha256(image + text.encode()).hexdigest()
    sides = ("left", "right", "top", "bottom")
    return f"Clear up the {sides[int(digest[0], 16) % 4]}, {digest[:6]}."


def answer_to(call: Call) -> str:
    """The text of the answer to a call."""
    if call.schema is None:
        return sentence_of(call.image, call.text)
    return json.dumps(_fill(call.schema, call.schema, score_of(call.image)))


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


def _read_call(body: Mapping[str, Any], authorization: str) -> Call:
    texts, image = [], b""
    for message in body["messages"]:
        content = message["content"]
        parts: list[Any] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part["type"] == "text":
                texts.append(part["text"])
            elif part["type"] == "image_url":
                image = base64.b64decode(part["image_url"]["url"].partition("base64,")[2])
    schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
    return Call(-1, body["model"], "\n".join(texts), image, schema, authorization)


def _completion(call: Call, content: str | None, refusal: str | None) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    return {
        "id": f"chatcmpl-{call.number}",
        "object": "chat.completion",
        "created": 0,
        "model": call.model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


def _parse_fault(text: str) -> Fault:
    """``KIND[=NUMBER][:TIMES]``; the number is the status, or the seconds of a delay."""
    head, _, times = text.partition(":")
    kind, _, number = head.partition("=")
    fault = Fault(kind, times=int(times) if times else None)  # pyright: ignore[reportArgumentType]
    if kind not in FaultKind.__args__:
        raise argparse.ArgumentTypeError(f"unknown fault {kind}: one of {', '.join(FaultKind.__args__)}")
    if number and kind == "status":
        fault.status = int(number)
    elif number:
        fault.seconds = float(number)
    return fault


def main(argv: Sequence[str] | None = None) -> int:
    """The launcher."""
    parser = argparse.ArgumentParser(prog="python -m tests.kit.openai_server", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="default: any free one")
    parser.add_argument("--fault", type=_parse_fault, action="append", default=[], help="KIND[=NUMBER][:TIMES]")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND...: run it against the server")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    server = OpenAIServer(args.fault, args.port)
    if not command:
        print(f"serving {server.base_url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve()
        return 0
    with server:
        return subprocess.run(command, env={**os.environ, **server.environment}).returncode


if __name__ == "__main__":
    raise SystemExit(main())
