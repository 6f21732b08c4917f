"""A web server on loopback that serves files with ranges and etags, cuts connections, and can pose as the hub."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

COMMIT = "c0ffee00" * 5


@dataclass
class FileServer:
    """files: by path. cuts: of the next answers for a path, the bytes after which the connection is
    cut. asked: (method, path,
    Range) of every request. damaged: paths that are served with another first byte. ranges: whether they are granted.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)
    statuses: list[int] = field(default_factory=list)
    ranges: bool = True
    url: str = ""

    def host_repository(self, repository: str, files: dict[str, bytes], large: set[str]) -> None:
        """Answer as the hub does for a data set. large: files that it holds as LFS, known by their SHA-256."""
        siblings, tree = [], []
        for name, content in files.items():
            self.files[f"/datasets/{repository}/resolve/{COMMIT}/{name}"] = content
            sibling: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git_hash(content)}
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
            if name in large:
                lfs = {"size": len(content), "pointerSize": 130}
                sha256 = hashlib.sha256(content).hexdigest()
                sibling["lfs"], entry["lfs"] = lfs | {"sha256": sha256}, lfs | {"oid": sha256}
            siblings.append(sibling)
            tree.append(entry)
        about = {"id": repository, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
        for path in (f"/api/datasets/{repository}", f"/api/datasets/{repository}/revision/{COMMIT}"):
            self.files[path] = json.dumps(about).encode()
        self.files[f"/api/datasets/{repository}/tree/{COMMIT}"] = json.dumps(tree).encode()


def git_hash(content: bytes) -> str:
    """What git names a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving(server: FileServer) -> Iterator[FileServer]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _answer(server, self, body=True)

        def do_HEAD(self) -> None:
            _answer(server, self, body=False)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        server.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        http.shutdown()
        thread.join()


def _answer(server: FileServer, request: BaseHTTPRequestHandler, body: bool) -> None:
    path = urlsplit(request.path).path
    asked_range = request.headers.get("Range", "")
    server.asked.append((request.command, path, asked_range))
    if server.statuses:
        _status(request, server.statuses.pop(0))
        return
    content = server.files.get(path)
    if content is None:
        _status(request, 404)
        return
    etag = f'"{hashlib.sha256(content).hexdigest()}"'
    if path in server.damaged:
        content = bytes([content[0] ^ 1]) + content[1:]
    start = _start(asked_range) if server.ranges and request.headers.get("If-Range", etag) == etag else 0
    if start >= len(content) and start:
        _status(request, 416, {"Content-Range": f"bytes */{len(content)}"})
        return
    request.send_response(206 if start else 200)
    headers = {"ETag": etag, "X-Repo-Commit": COMMIT, "Content-Length": str(len(content) - start)}
    if start:
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
    for name, value in headers.items():
        request.send_header(name, value)
    request.end_headers()
    if body:
        _send(request, content[start:], server.cuts.get(path, []))


def _send(request: BaseHTTPRequestHandler, content: bytes, cuts: list[int]) -> None:
    if cuts and (cut := cuts.pop(0)) < len(content):
        request.wfile.write(content[:cut])
        request.wfile.flush()
        request.close_connection = True
        request.connection.shutdown(socket.SHUT_RDWR)
        return
    request.wfile.write(content)


def _status(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str] | None = None) -> None:
    request.send_response(status)
    for name, value in {"Content-Length": "0", **(headers or {})}.items():
        request.send_header(name, value)
    request.end_headers()


def _start(asked_range: str) -> int:
    return int(asked_range.removeprefix("bytes=").partition("-")[0]) if asked_range else 0
