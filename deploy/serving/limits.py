"""Who may ask, how much at once, and how large: pure ASGI, before anything is parsed."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# What a browser needs to show the page, and what a probe needs to see that the server lives.
OPEN_PATHS: Final = frozenset({"/", "/health", "/favicon.ico"})
RETRY_AFTER_S: Final = 1
_DRAIN: Final = 4


class RequireKey:
    """Refuses requests without the key, as OpenAI's clients send it: `Authorization: Bearer KEY`."""

    def __init__(self, app: App, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._knows_key(scope):
            await refuse(
                send, 401, "this server wants its key: Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"}
            )
            return
        await self._app(scope, receive, send)

    def _knows_key(self, scope: Scope) -> bool:
        kind, _, given = header(scope, b"authorization").partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._key)


class LimitLoad:
    """Refuses bodies over `max_bytes` (413), and a request while `max_waiting` others are being answered (429)."""

    def __init__(self, app: App, max_bytes: int, max_waiting: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_waiting = max_waiting
        self._waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
        elif self._waiting >= self._max_waiting:
            busy = f"{self._waiting} requests are being answered, which is all this server takes: try again"
            await refuse(send, 429, busy, {"Retry-After": str(RETRY_AFTER_S)})
        else:
            self._waiting += 1
            try:
                await self._within_bytes(scope, receive, send)
            finally:
                self._waiting -= 1

    async def _within_bytes(self, scope: Scope, receive: Receive, send: Send) -> None:
        too_large = f"the body is larger than the {self._max_bytes} bytes that this server takes"
        body, received, more = bytearray(), 0, True
        # A client that is still sending would not see the refusal, so some of what is too much is read and forgotten.
        while more and received <= _DRAIN * self._max_bytes:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client is gone
            received += len(message.get("body", b""))
            if received <= self._max_bytes:
                body += message.get("body", b"")
            more = bool(message.get("more_body"))
        if received > self._max_bytes:
            await refuse(send, 413, too_large, {"Connection": "close"})
            return
        whole: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> MutableMapping[str, Any]:
            return whole.pop() if whole else await receive()

        await self._app(scope, replay, send)


def header(scope: Scope, name: bytes) -> bytes:
    """Value of a header, b"" where it is not sent. name: in lower case."""
    value: bytes = dict(scope["headers"]).get(name, b"")
    return value


async def refuse(send: Send, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
    """Answer with a reason in JSON, in the form of all other refusals."""
    body = json.dumps({"detail": reason}).encode()
    sent = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    raw = [(name.lower().encode(), value.encode()) for name, value in sent.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
