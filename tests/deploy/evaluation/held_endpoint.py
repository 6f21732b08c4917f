"""An OpenAI-compatible endpoint whose answers a test chooses. It can answer so many requests and then hold the others,
so that a test can meet an evaluation half-way whatever the machine is doing."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


def last_word(request: str) -> str:
    """An answer whose query is the last word of the request."""
    return f"<answer>{json.dumps({'query': request.split()[-1]})}</answer>"


class HeldEndpoint:
    """Answers the first `answers` requests at once, the rest after `release`; `answer` gives the text for the last
    message."""

    def __init__(self, answers: int, answer: Callable[[str], str] = last_word) -> None:
        self._free = threading.Semaphore(answers)
        self._server = _Server(("127.0.0.1", 0), _handler(self._free, answer))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def release(self) -> None:
        """Hold nothing any more."""
        for _ in range(1000):
            self._free.release()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked may have been killed."""


def _handler(free: threading.Semaphore, answer: Callable[[str], str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            free.acquire()
            text = answer(body["messages"][-1]["content"])
            reply = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    return Handler
