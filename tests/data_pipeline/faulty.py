"""A real S3 server on loopback, and a proxy before it that answers 503, cuts bodies and stalls."""

import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}


@contextmanager
def s3_server() -> Iterator[str]:
    """moto's server as a process of its own; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 0.2).close()
                break
            except OSError:
                assert server.poll() is None, "moto's server ended"
                assert time.monotonic() < deadline, "moto's server did not start"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


class Proxy:
    """Passes requests on to `upstream`; does harm to GETs at the rates of `faults`.

    faults: "503", "cut" and "stall" -> share of GETs; drawn in a fixed sequence, one draw a GET
    stall: seconds that a stalled answer is held back
    seen: how many GETs, and how many of each fault, there have been
    """

    def __init__(self, upstream: str, faults: dict[str, float], *, stall: float = 5.0) -> None:
        self.upstream = upstream.removeprefix("http://")
        self.faults = faults
        self.stall = stall
        self.seen: Counter[str] = Counter()
        self._draw = random.Random(0)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def fate(self) -> str | None:
        """What happens to the next GET."""
        with self._lock:
            self.seen["GET"] += 1
            draw = self._draw.random()
            for fault, share in self.faults.items():
                draw -= share
                if draw < 0:
                    self.seen[fault] += 1
                    return fault
        return None

    def hold(self) -> None:
        self._ended.wait(self.stall)

    def close(self) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            fate = proxy.fate()
            if fate == "503":
                self._answer(503, [], b"<Error><Code>ServiceUnavailable</Code></Error>")
                return
            if fate == "stall":
                proxy.hold()
                self.close_connection = True
                return
            status, headers, body = self._ask()
            if fate == "cut" and body:
                self._head(status, headers, len(body))
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.close_connection = True
                return
            self._answer(status, headers, body)

        def do_HEAD(self) -> None:
            self._answer(*self._ask())

        do_PUT = do_POST = do_DELETE = do_HEAD

        def _ask(self) -> tuple[int, list[tuple[str, str]], bytes]:
            length = int(self.headers.get("Content-Length") or 0)
            content = self.rfile.read(length) if length else None
            upstream = http.client.HTTPConnection(proxy.upstream, timeout=30)
            upstream.request(self.command, self.path, content, dict(self.headers.items()))
            answer = upstream.getresponse()
            body = answer.read()
            headers = [(n, v) for n, v in answer.getheaders() if n.lower() not in HOP_BY_HOP]
            if self.command == "HEAD":
                headers.append(("Content-Length", answer.getheader("Content-Length") or "0"))
            upstream.close()
            return answer.status, headers, body

        def _head(self, status: int, headers: list[tuple[str, str]], length: int) -> None:
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(length))
            self.end_headers()

        def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            self._head(status, headers, len(body))
            self.wfile.write(body)

    return Handler
