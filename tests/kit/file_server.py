"""A real HTTP server on the loopback that serves a folder with byte ranges, and the ways in which servers fail."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import unquote, urlsplit


@dataclass
class Faults:
    """What goes wrong.

    Attributes:
        ranges: honour Range; without, every answer is the whole file.
        dead: requests that get no answer, before any does.
        status: this many requests get status 503 first.
        cut: this many answers break off in the middle of the body.
        stall: this many answers stop in the middle of the body, for ``seconds``.
        shift: ranges come that many bytes late, yet named rightly.
        redirect: answer with a redirection to ``/moved/...?signature=N``, and refuse all but the latest signature.
    """

    ranges: bool = True
    dead: int = 0
    status: int = 0
    cut: int = 0
    stall: int = 0
    seconds: float = 5.0
    shift: int = 0
    redirect: bool = False
    signature: int = 0


@dataclass
class FileServer:
    """Serves a folder in threads of this process; a context manager."""

    folder: Path
    faults: Faults = field(default_factory=Faults)
    requests: list[tuple[str, str]] = field(default_factory=list)
    sent: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        handler = type("Handler", (_Handler,), {"kit": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True

    @property
    def url(self) -> str:
        """Address of the folder."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def strikes(self, name: str) -> bool:
        """Whether a fault that is counted hits now."""
        with self.lock:
            left = getattr(self.faults, name)
            if left > 0:
                setattr(self.faults, name, left - 1)
            return left > 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    kit: ClassVar[FileServer]

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        with self.kit.lock:
            self.kit.requests.append((self.path, wanted))
        if self.kit.strikes("dead"):
            self.close_connection = True
            return
        if self.kit.strikes("status"):
            return self._send(503, b"", {"Retry-After": "0"})
        parts = urlsplit(self.path)
        path = parts.path
        if self.kit.faults.redirect and not path.startswith("/moved/"):
            return self._send(302, b"", {"Location": f"/moved{path}?signature={self.kit.faults.signature}"})
        if path.startswith("/moved/") and parts.query != f"signature={self.kit.faults.signature}":
            return self._send(403, b"")
        file = self.kit.folder / unquote(path.removeprefix("/moved")).lstrip("/")
        if not file.is_file():
            return self._send(404, b"no such file")
        self._file(file.read_bytes(), wanted)

    def _file(self, content: bytes, wanted: str) -> None:
        tags = {"ETag": f'"{hash(content)}"'}
        if not (wanted and self.kit.faults.ranges):
            return self._send(200, content, tags)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1 if last else len(content), len(content))
        if start >= len(content):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        start, stop = start + self.kit.faults.shift, min(stop + self.kit.faults.shift, len(content))
        named = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        self._send(206, content[start:stop], {**tags, **named})

    def _send(self, status: int, body: bytes, extra: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(extra or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        half = len(body) // 2
        if len(body) > 1 and self.kit.strikes("cut"):
            self._write(body[:half])
            self.close_connection = True
        elif len(body) > 1 and self.kit.strikes("stall"):
            self._write(body[:half])
            time.sleep(self.kit.faults.seconds)
            self.close_connection = True
        else:
            self._write(body)

    def _write(self, body: bytes) -> None:
        self.wfile.write(body)
        self.wfile.flush()
        with self.kit.lock:
            self.kit.sent += len(body)

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client has had enough
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass
