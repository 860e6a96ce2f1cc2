"""A store having a bad day: an HTTP proxy in front of an S3 server that answers some requests wrongly, late, or not at all.

Clients use the proxy's port as their endpoint; the Host header, which signatures cover, goes through as it came.
"""

from __future__ import annotations

import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import urlsplit

ANSWERS = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "unavailable": (503, "ServiceUnavailable", "Please try again."),
    "internal": (500, "InternalError", "We encountered an internal error."),
    "denied": (403, "AccessDenied", "Access Denied."),
}
"""Fault -> status, code and message that the proxy gives by itself; the server never hears of the request."""
OTHERS = ("bare", "hang", "drop", "cut", "lost")
"""bare: 503 without a body. hang: never answers. drop: closes the connection unheard. cut: closes it half way through the
answer's body. lost: the server does what was asked, then the connection closes without an answer."""
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


@dataclass
class Rule:
    """When a fault happens.

    Args:
        fault: A word of ANSWERS or OTHERS.
        method: Of the requests that it happens to; empty for all.
        path: What their path and query contain.
        times: How often at most; None for ever.
        share: Of the matching requests, by a seeded draw.
        after: Matching requests that pass first.
    """

    fault: str
    method: str = ""
    path: str = ""
    times: int | None = 1
    share: float = 1.0
    after: int = 0
    draws: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        assert self.fault in ANSWERS or self.fault in OTHERS, self.fault

    def strikes(self, method: str, path: str) -> bool:
        """Whether it happens now; counts."""
        if self.times == 0 or not method.startswith(self.method) or self.path not in path:
            return False
        if self.after:
            self.after -= 1
            return False
        if self.share < 1.0 and self.draws.random() >= self.share:
            return False
        self.times = None if self.times is None else self.times - 1
        return True


class Request(NamedTuple):
    """One request that arrived.

    Args:
        method: HTTP's.
        path: With its query.
        met: Fault, or "passed", or "unheard" where the server was not there.
        at_s: Unix time.
    """

    method: str
    path: str
    met: str
    at_s: float


class Proxy:
    """Forwards to a server, except where a rule says otherwise.

    Attributes:
        done: Fault (or "passed") -> how many requests met it.
        requests: In order of arrival.
    """

    def __init__(self, endpoint: str) -> None:
        self._upstream = urlsplit(endpoint).netloc
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._rules: list[Rule] = []
        self.done: Counter[str] = Counter()
        self.requests: list[Request] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def add(self, fault: str, **when: Any) -> Rule:
        """One more rule; the first that strikes counts. See Rule."""
        rule = Rule(fault, **when)
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """No more faults, and counts from nothing."""
        with self._lock:
            self._rules.clear()
            self.done.clear()
            self.requests.clear()

    def arrived(self, method: str, path: str) -> Request:
        """A request, with what happens to it."""
        with self._lock:
            met = next((rule.fault for rule in self._rules if rule.strikes(method, path)), "passed")
            self.done[met] += 1
            self.requests.append(Request(method, path, met, time.time()))
            return self.requests[-1]

    def unheard(self, request: Request) -> None:
        """The server is not there: the request was not passed on after all."""
        with self._lock, suppress(ValueError):  # all was cleared since
            self.requests[self.requests.index(request)] = request._replace(met="unheard")
            self.done["passed"] -= 1

    def hold(self) -> None:
        """Until the proxy closes."""
        self._closing.wait()

    def forward(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        """The server's answer to a request. Raises OSError, HTTPException if it gives none."""
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            connection.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
            for name, value in handler.headers.items():
                if name.lower() not in _HOP:
                    connection.putheader(name, value)
            if body or handler.command in ("PUT", "POST"):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body or None)
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()

    def close(self) -> None:
        """Stop serving; what hangs is let go."""
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the client went away
            self.close_connection = True

    def _handle(self) -> None:
        body, request = self._body(), self.proxy.arrived(self.command, self.path)
        fault = request.met
        if fault == "hang":
            self.proxy.hold()
        if fault in ("hang", "drop"):
            self.close_connection = True
        elif fault in ANSWERS:
            status, code, message = ANSWERS[fault]
            xml = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
            self._answer(status, {"Content-Type": "application/xml"}, xml.encode())
        elif fault == "bare":
            self._answer(503, {}, b"")
        else:
            self._pass(body, request)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def _pass(self, body: bytes, request: Request) -> None:
        try:
            answer, content = self.proxy.forward(self, body)
        except (OSError, http.client.HTTPException):  # as if the server itself had closed the connection
            self.proxy.unheard(request)
            self.close_connection = True
            return
        if request.met == "lost":
            self.close_connection = True
            return
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self._answer(answer.status, headers, content, length, cut=request.met == "cut")

    def _answer(
        self, status: int, headers: dict[str, str], content: bytes, length: str | None = None, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(parts)

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps quiet."""


@contextmanager
def in_front_of(endpoint: str) -> Iterator[Proxy]:
    """A proxy for the time of the block."""
    proxy = Proxy(endpoint)
    try:
        yield proxy
    finally:
        proxy.close()
