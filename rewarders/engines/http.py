"""What every engine behind HTTP does alike: its session, its deadlines, and what it makes of a broken network.

No retries in here, and no redirects: every arrival upstream is one the quota knows.
"""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, ClassVar, Final, Literal, TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec

from rewarders.engines.base import BadQuery, EngineThrottled, EngineUnavailable, SearchEngine
from rewarders.engines.connections import connector
from rewarders.engines.permits import Permit, Slot, body_refused, head_arrived, sending_trace, unlimited
from rewarders.engines.verdicts import DEFAULT_RETRY_AFTER_S, Undecided

T = TypeVar("T")
# (status, headers, body) -> what the answer says. Raises BadQuery, EngineUnavailable or Undecided.
Reader = Callable[[int, Mapping[str, str], bytes], T]

_CHUNK_BYTES: Final = 65_536


class HttpSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach a service.

    base_url: host of the service, or the folder of its API. tool, email: who is asking; both are sent as User-Agent.
    timeout_s: deadline of one request from the first byte sent to the last received, waiting for the quota not
    included. connect_timeout_s: deadline of opening a connection. max_body_bytes: longer answers are refused.
    max_connections: requests in flight; the others wait before they ask for a permit. None: the caller bounds them.
    """

    base_url: str
    tool: str = "deepretrieval"
    email: str | None = None
    timeout_s: float = 20.0
    connect_timeout_s: float = 5.0
    max_body_bytes: int = 8_000_000
    max_connections: int | None = None

    service: ClassVar[str]

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"the {self.service} address must start with http:// or https://, got {self.base_url!r}")
        if "@" in urlsplit(self.base_url).netloc:
            raise ValueError(f"the {self.service} address must not hold a user or password: errors quote it")
        if not self.user_agent.isprintable() or not self.user_agent.isascii():
            raise ValueError("tool and email must be printable ASCII: they are sent as a header")
        if self.max_connections is not None and self.max_connections < 1:
            raise ValueError(f"max_connections must be at least 1, got {self.max_connections}")

    @property
    def user_agent(self) -> str:
        contact = f"; {self.email}" if self.email else ""
        return f"{self.tool} (asynchronous search client{contact})"

    def folder(self, default: str) -> str:
        """The address without its last slash; a bare host gets the `default` path."""
        folder = self.base_url.rstrip("/")
        return folder if urlsplit(folder).path else folder + default


class HttpEngine(SearchEngine):
    """A client that enters `permit()` around every HTTP request: put the quota there."""

    throttled_wait_s: ClassVar[float] = DEFAULT_RETRY_AFTER_S
    """The pause after a 429 that names none, in seconds."""

    def __init__(self, settings: HttpSettings, permit: Permit) -> None:
        self._http = settings
        self._permit = permit
        self._session: aiohttp.ClientSession | None = None
        self._connections: AbstractAsyncContextManager[None] = (
            nullcontext() if settings.max_connections is None else asyncio.Semaphore(settings.max_connections)
        )
        self._canary_lock = asyncio.Lock()
        # When the last search that was answered properly had left: seconds of the monotonic clock.
        self._healthy_at = float("-inf")
        self.requests_sent = 0

    async def start(self) -> None:
        """Open the keep-alive session. No request is made."""
        timeout = aiohttp.ClientTimeout(total=self._http.timeout_s, sock_connect=self._http.connect_timeout_s)
        self._session = aiohttp.ClientSession(
            connector=connector(self._http.base_url, None if self._permit is unlimited else self._http.timeout_s),
            timeout=timeout,
            headers={"User-Agent": self._http.user_agent, "Accept": "application/json"},
            cookie_jar=aiohttp.DummyCookieJar(),
            # Only a quota asks when a request is written, and asking takes time.
            trace_configs=[] if self._permit is unlimited else [sending_trace()],
            middlewares=(_never_send_twice,),
        )

    async def close(self) -> None:
        session, self._session = self._session, None  # gone at once, so that nobody else starts a request
        if session is not None:
            await session.close()

    async def check(self) -> None:
        """Make one cheap request. Raises EngineUnavailable, naming the address, if that fails."""
        try:
            await self._probe()
        except EngineUnavailable as error:
            raise type(error)(f"{self._http.base_url}: {error.reason}", error.retry_after_s) from None

    @abstractmethod
    async def _probe(self) -> object:
        """The request of `check`. Raises EngineUnavailable."""

    @abstractmethod
    async def _ask_canary(self) -> object:
        """One search that cannot be wrong. Raises as a `Reader`."""

    async def _settle(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Await `ask()`; where the service refuses without saying why, prove that it answers others, and ask again.

        Raises BadQuery where `ask` does, or if the service answers the canary while it refuses this one twice;
        EngineUnavailable for everything else that is no answer.
        """
        try:
            return await ask()
        except Undecided:
            await self._prove_healthy(since=time.monotonic())
        try:
            return await ask()
        except Undecided as refusal:
            raise BadQuery(refusal.reason) from None

    async def _prove_healthy(self, since: float) -> None:
        """Return once a search sent after `since` has been answered properly; raise EngineUnavailable if it fails.

        Concurrent refusals share one canary, and any other search that succeeded meanwhile saves it.
        """
        async with self._canary_lock:
            if self._healthy_at >= since:
                return
            try:
                await self._ask_canary()
            except (Undecided, BadQuery) as error:
                raise EngineUnavailable(f"search backend down: even a canary query fails ({error.reason})") from None

    async def _request(
        self,
        method: Literal["GET", "POST"],
        url: str,
        read: Reader[T],
        options: Callable[[Slot], dict[str, Any]] = lambda _: {},
        *,
        is_search: bool = True,
    ) -> T:
        """One HTTP request. Raises as `read`, and EngineUnavailable for network trouble.

        Args:
            is_search: whether a proper answer shows that the service answers searches.
            options: `params` or `data` of aiohttp for a request under this slot. Raises EngineUnavailable if there
                can be none.
        """
        async with self._connections, self._permit() as slot:
            if self._session is None:
                slot.unused()
                raise EngineUnavailable("the client is closed")
            try:
                sent = options(slot)
            except EngineUnavailable:
                slot.unused()
                raise
            sent_at = time.monotonic()
            self.requests_sent += 1
            try:
                sending = self._session.request(method, url, allow_redirects=False, trace_request_ctx=slot, **sent)
                async with sending as response:
                    head_arrived(slot, response.status, response.headers, self.throttled_wait_s)
                    body = await self._read_body(response)
            except TimeoutError:
                raise EngineUnavailable(f"no answer within {self._http.timeout_s:g} s") from None
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise _network_error(error) from None
        try:
            answer = read(response.status, response.headers, body)
        except EngineThrottled as error:
            body_refused(slot, response.status, error)
            raise
        if is_search:
            self._healthy_at = max(self._healthy_at, sent_at)
        return answer

    async def _read_body(self, response: aiohttp.ClientResponse) -> bytes:
        length = response.content_length
        if length is not None and length <= self._http.max_body_bytes and "Content-Encoding" not in response.headers:
            return await response.read()  # the usual case, and the fastest
        body = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            body += chunk
            if len(body) > self._http.max_body_bytes:
                raise EngineUnavailable(f"answer longer than {self._http.max_body_bytes} bytes")
        return bytes(body)


def _network_error(error: Exception) -> EngineUnavailable:
    """The class says what happened; the text of some of these quotes the request."""
    return EngineUnavailable(f"network error ({type(error).__name__})")


async def _never_send_twice(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """aiohttp sends a GET again, unasked, when its connection breaks: an arrival upstream that no permit covers. It
    does so for its own errors only, so they leave here as ours.
    """
    try:
        return await handler(request)
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise _network_error(error) from None
