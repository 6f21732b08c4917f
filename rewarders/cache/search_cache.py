"""From a search to its answer, the cheapest way first: memory, disk, the fleet, the engine.

What is kept is what the engine said of a query: results and refusals. That it could not be asked is never kept: the
next one to ask asks again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from rewarders.cache.disk import DiskResults
from rewarders.cache.found import Found, Refusal, answer_of, decode_found, encode_found
from rewarders.cache.key import SearchKey
from rewarders.cache.memory import Flights, ResultMemory
from rewarders.cache.shared import FleetResults
from rewarders.engines.base import BadQuery, SearchRequest, SearchResult

Fetch = Callable[[SearchRequest], Awaitable[SearchResult]]
Version = Callable[[], Awaitable[str]]

VERSION_KNOWN_FOR_S = 1.0  # the engine is not asked for its version at every search


class CacheStats(msgspec.Struct):
    """Searches by where their answer came from. hits: memory. joined: a search already in flight. disk: a file of
    this host. shared: another rewarder, through the broker. misses: the engine was asked.
    """

    hits: int = 0
    joined: int = 0
    misses: int = 0
    disk: int = 0
    shared: int = 0


class SearchCache:
    """The cache of one process, for one event loop and one engine.

    max_entries, max_ids: see `ResultMemory`; 0 entries means no storing in memory. source: what is searched, whatever
    its address. version: asks for the version of its data; None: there is none. disk, fleet: the wider circles; None:
    left out.
    """

    def __init__(
        self,
        max_entries: int = 100_000,
        max_ids: int = 5_000_000,
        *,
        source: str = "",
        version: Version | None = None,
        disk: DiskResults | None = None,
        fleet: FleetResults | None = None,
    ) -> None:
        self.stats = CacheStats()
        self.version = version
        self._source = source
        self._memory = ResultMemory(max_entries, max_ids)
        self._flights: Flights[SearchKey, Found] = Flights()
        self._asking_version: Flights[None, str] = Flights()
        self._known_version = ""
        self._version_at = float("-inf")
        self._disk = disk
        self._fleet = fleet

    def __len__(self) -> int:
        return len(self._memory)

    async def start(self) -> None:
        """Open the file on disk, if there is to be one."""
        if self._disk is not None:
            await self._disk.start()

    async def close(self) -> None:
        """Cancel what is in flight (its waiters get EngineUnavailable), then close the file."""
        await self._flights.close()
        await self._asking_version.close()
        if self._disk is not None:
            await self._disk.close()

    async def search(self, request: SearchRequest, fetch: Fetch) -> SearchResult:
        """Return the result of `request`: kept, from a flight under way, or by `await fetch(request)`.

        Raises what fetch raises, to everyone who waits for it. Cancelling one waiter leaves the others
        their answer; when the last one goes, the request is cancelled too, so that it stops waiting for
        quota.
        """
        version = "" if self.version is None else await self._version_now(self.version)
        key = SearchKey(self._source, version, request)
        found = self._memory.get(key)
        if found is not None:
            self.stats.hits += 1
            return answer_of(found)
        if key in self._flights:
            self.stats.joined += 1
        return answer_of(await self._flights.join(key, lambda: self._find(key, fetch)))

    async def _version_now(self, version: Version) -> str:
        now = asyncio.get_running_loop().time()
        if now - self._version_at >= VERSION_KNOWN_FOR_S:
            self._known_version = await self._asking_version.join(None, version)
            self._version_at = now
        return self._known_version

    async def _find(self, key: SearchKey, fetch: Fetch) -> Found:
        found = None if self._disk is None else await self._disk.get(key)
        if found is not None:
            self.stats.disk += 1
        elif self._fleet is None:
            found = await self._ask(key.request, fetch)
            self._to_disk(key, found)
        else:
            found = await self._from_fleet(self._fleet, key, fetch)
            self._to_disk(key, found)
        self._memory.put(key, found)
        return found

    async def _from_fleet(self, fleet: FleetResults, key: SearchKey, fetch: Fetch) -> Found:
        digest = key.digest
        found = _usable(await fleet.get(digest))
        if found is not None:
            self.stats.shared += 1
            return found
        try:
            found = await self._ask(key.request, fetch)
        except BaseException:  # cancelled too: somebody else may still want it
            fleet.failed(digest)
            raise
        fleet.put(digest, encode_found(found))
        return found

    async def _ask(self, request: SearchRequest, fetch: Fetch) -> Found:
        self.stats.misses += 1
        try:
            return await fetch(request)
        except BadQuery as error:
            return Refusal(error.reason)

    def _to_disk(self, key: SearchKey, found: Found) -> None:
        if self._disk is not None:
            self._disk.put(key, found)


def _usable(payload: bytes | None) -> Found | None:
    """What another rewarder found; None if it cannot be read, as from another release."""
    try:
        return None if payload is None else decode_found(payload)
    except ValueError:
        return None
