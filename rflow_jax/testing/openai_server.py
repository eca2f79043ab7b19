"""A real HTTP server on the loopback that answers chat completions the way OpenAI's API does.

Answers follow from the request alone: a question for JSON gets an object that fits its schema (or the form shown in its
instructions), in which every number is ``score_of`` the image's bytes; a question for log-probabilities gets those of
``decision_of`` the image; any other question gets a sentence made from a hash of image and text.

``python -m rflow_jax.testing.openai_server -- COMMAND...`` runs a command with OPENAI_BASE_URL and OPENAI_API_KEY of
a server of its own and returns the command's exit status; ``--port N`` alone just serves. With
``--delay 2 --spread 1 --chaos 0.1`` it is slow, out of order and unreliable, in the same way each time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import urlsplit

from rflow_jax.testing.openai_answers import (
    Call,
    Chaos,
    Fault,
    FaultKind,
    answer_to,
    completion,
    decision_of,
    first_tokens,
    parse_fault,
    score_of,
    sentence_of,
)

__all__ = [
    "KEY", "Call", "Chaos", "Fault", "FaultKind", "OpenAIServer", "decision_of", "score_of", "sentence_of",
]  # fmt: skip

KEY = "sk-local-server-key"


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # of clients that connect at once


class OpenAIServer:
    """The server; a context manager that serves in threads of this process.

    Args:
        faults: what goes wrong.
        port: 0 is any free one.
        chaos: what goes wrong at random.
        delay: seconds that every answer takes.
        spread: up to this many seconds more, by the request: answers come out of order.
        refuse: ways to ask for JSON (json_schema, json_object) that get a 400, as from older servers.
        usage: whether answers count their tokens.
    """

    def __init__(
        self,
        faults: Sequence[Fault] = (),
        port: int = 0,
        *,
        chaos: Chaos | None = None,
        delay: float = 0.0,
        spread: float = 0.0,
        refuse: Sequence[str] = (),
        usage: bool = True,
    ) -> None:
        self.faults = list(faults)
        self.chaos, self.delay, self.spread, self.refuse, self.usage = chaos, delay, spread, refuse, usage
        self.calls: list[Call] = []
        self.most_at_once = 0
        self.closing = threading.Event()
        self._at_once = 0
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"kit": self})
        self._http = _Http(("127.0.0.1", port), handler)

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

    def __enter__(self) -> OpenAIServer:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    def log(self, call: Call) -> Call:
        """Numbers a call and remembers it."""
        digest = call.digest
        with self._lock:
            call = replace(call, number=len(self.calls), attempt=self._seen[digest])
            self._seen[digest] += 1
            self.calls.append(call)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            return call

    def answered(self) -> None:
        """One call less is being answered."""
        with self._lock:
            self._at_once -= 1

    def faults_for(self, call: Call) -> dict[str, Fault]:
        """The faults that hit this call, by kind; each counts as struck."""
        with self._lock:
            hits = [f for f in self.faults if (f.times is None or f.struck < f.times) and f.when(call)]
            if self.chaos and (fault := self.chaos.fault_for(call)):
                hits.append(fault)
            for fault in hits:
                fault.struck += 1
            return {fault.kind: fault for fault in hits}

    def respond(self, call: Call, faults: Mapping[str, Fault]) -> dict[str, Any]:
        """The reply, with whatever goes wrong inside it."""
        reply = _completion(call, faults)
        if not self.usage:
            del reply["usage"]
        return reply

    def refusal(self, call: Call) -> dict[str, Any] | None:
        """An error in place of the answer: its status, and its fields or a whole page; for subclasses."""
        return None

    def wait_for(self, call: Call, faults: Mapping[str, Fault]) -> None:
        """Takes the time that an answer is to take."""
        seconds = self.delay + self.spread * int(call.digest[:4], 16) / 0xFFFF
        if "delay" in faults:
            seconds += faults["delay"].seconds
        if "reorder" in faults:
            seconds += max(0, 8 - call.number % 8) * faults["reorder"].seconds
        self.closing.wait(seconds)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    kit: ClassVar[OpenAIServer]

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        sent = self.rfile.read(length)
        if len(sent) < length:  # the client gave up while it asked
            self.close_connection = True
            return
        body = json.loads(sent)
        address = urlsplit(self.path)
        if not address.path.endswith("/chat/completions"):
            return self._send(404, b'{"error": {"message": "no such path"}}')
        call = self.kit.log(Call(-1, body, self.headers.get("Authorization", ""), query=address.query))
        try:
            self._answer(call)
        finally:
            self.kit.answered()

    def _answer(self, call: Call) -> None:
        if call.format in self.kit.refuse:
            return self._fail(400, f"response_format: {call.format} is not supported")
        if refusal := self.kit.refusal(call):
            status, page = refusal.pop("status"), refusal.pop("page", None)
            return self._send(status, page.encode() if page else json.dumps({"error": refusal}).encode())
        faults = self.kit.faults_for(call)
        self.kit.wait_for(call, faults)
        if "drop" in faults:
            self.close_connection = True
            return
        if fault := faults.get("status"):
            extra = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            message = fault.message.replace("{key}", call.authorization.removeprefix("Bearer "))
            return self._fail(fault.status, message, extra)
        content = json.dumps(self.kit.respond(call, faults)).encode()
        self._send(200, content[: len(content) // 2] if "cut_body" in faults else content, half="half_body" in faults)

    def _fail(self, status: int, message: str, extra: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps({"error": {"message": message}}).encode(), extra)

    def _send(self, status: int, body: bytes, extra: Mapping[str, str] | None = None, half: bool = False) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(extra or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if half else body)
        self.close_connection |= half

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client gave up waiting
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _completion(call: Call, faults: Mapping[str, Fault]) -> dict[str, Any]:
    tokens = first_tokens(call.image) if call.decides and "no_logprobs" not in faults else {}
    if "refusal" in faults:
        return completion(call, None, "I cannot help with that.")
    if "empty" in faults:
        return completion(call, "")
    if "off_schema" in faults:
        return completion(call, "{}", tokens={"Maybe": -0.1, "{}": -2.4} if tokens else {})
    content = answer_to(call)
    if "truncated" in faults:
        return completion(call, content[: len(content) // 2], ended="length")
    return completion(call, content, ended="length" if call.decides else "stop", tokens=tokens)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rflow_jax.testing.openai_server", description=__doc__)
    add: Callable[..., Any] = parser.add_argument
    add("--port", type=int, default=0, help="default: any free one")
    add("--delay", type=float, default=0.0, help="seconds that every answer takes")
    add("--spread", type=float, default=0.0, help="up to this many seconds more: answers come out of order")
    add("--chaos", type=float, default=0.0, help="share of the requests that fail, in every way there is")
    add("--seed", type=int, default=0, help="of the chaos")
    add("--hang", type=float, default=30.0, help="seconds that the chaos keeps a client waiting")
    add("--fault", type=parse_fault, action="append", default=[], help="KIND[=NUMBER][:TIMES]")
    add("--refuse", choices=("json_schema", "json_object"), action="append", default=[], help="as older servers do")
    add("--no-usage", dest="usage", action="store_false", help="answers don't count their tokens")
    add("command", nargs=argparse.REMAINDER, help="-- COMMAND...: run it against the server")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The launcher."""
    args = _parser().parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    chaos = Chaos(args.chaos, args.seed, args.hang) if args.chaos else None
    slow = {"delay": args.delay, "spread": args.spread}
    server = OpenAIServer(args.fault, args.port, chaos=chaos, **slow, refuse=args.refuse, usage=args.usage)
    if not command:
        print(f"serving {server.base_url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve()
        return 0
    with server:
        return subprocess.run(command, env={**os.environ, **server.environment}).returncode


if __name__ == "__main__":
    raise SystemExit(main())
