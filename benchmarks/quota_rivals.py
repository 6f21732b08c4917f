"""Three clients in turn under the same real quota, on the same stretch of a training stream: ours, and the two that
others write. Part of `reward_throughput`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.quota_units import QUOTA_PER_S, Feed, requests_at, score_from
from benchmarks.rewarder_fleet import RewarderFleet
from benchmarks.training_stream import GROUP, PHASES, Group, StreamWriter
from common.tasks import Row
from common.tasks.publication_search import PublicationSearch
from rewarders.engines.base import SearchRequest
from rewarders.engines.permits import Permit
from rewarders.engines.pubmed import PubMedEngine, PubMedSettings
from rewarders.search_order import SearchOrder

TIMEOUT_S = 2.0
# Samples of the stretch that the slowest client asks for in a second: two calls for each that is well-formed.
SLOWEST_SAMPLES_PER_S = QUOTA_PER_S / 2

Client = Callable[[Sequence[Group], Permit], Awaitable[int]]


def stretch_of(rows: Sequence[Row], malformed: float, stale: float, seconds: float) -> list[Group]:
    """A short stream with the repeats of a long one: few requests, each of them once in every phase. So long that the
    slowest client takes about `seconds`.
    """
    per_phase = max(1, round(seconds * SLOWEST_SAMPLES_PER_S / GROUP / len(PHASES)))
    writer = StreamWriter(rows[:per_phase], malformed, stale, seed=0)
    return list(writer.generated(per_phase * len(PHASES)))


async def compare_clients(groups: Sequence[Group], folder: Path, url: str, top_k: int) -> dict[str, dict[str, Any]]:
    """Let each client work the same groups off; a sample counts if somebody still waits for it."""
    asking = Asking(url, top_k)
    clients: dict[str, Client] = {
        "ours": asking.ours,
        "one_call_per_sample": asking.once_per_sample,
        "two_calls_per_sample": asking.twice_per_sample,
    }
    settings = [f"search.url={url}", f"search.timeout_s={TIMEOUT_S:g}"]
    quota = [f"search.quota.requests={QUOTA_PER_S}", "search.quota.window_s=1"]
    report = {}
    async with RewarderFleet(folder, [*settings, *quota]) as fleet:
        for name, client in clients.items():
            async with quota_of(fleet, name) as permit:
                await opened(permit)
                before, began = await requests_at(url), time.monotonic()
                scored = await client(groups, permit)
                took, units = time.monotonic() - began, await requests_at(url) - before
            report[name] = {
                "scored": scored,
                "units": units,
                "seconds": round(took, 1),
                "units_per_s": round(units / took, 2),
                "samples_per_unit": round(scored / units, 3),
            }
    return report


class Asking:
    """What each client sends for a stream. Those of others know neither repeats nor that nobody waits any more."""

    def __init__(self, url: str, top_k: int) -> None:
        self._settings = PubMedSettings(base_url=url, api_key_env=None, timeout_s=TIMEOUT_S)
        self._url = url
        self._task = PublicationSearch(top_k=top_k)

    async def ours(self, groups: Sequence[Group], permit: Permit) -> int:
        """A rewarder."""
        engine = PubMedEngine(self._settings, permit=SearchOrder(permit, ahead=QUOTA_PER_S))
        feed = Feed(groups)
        await score_from(feed, self._task, engine)
        return feed.samples

    async def once_per_sample(self, groups: Sequence[Group], permit: Permit) -> int:
        """Every sample is searched for, whatever the model wrote."""
        return await self._ask(groups, permit, [{}], lambda query: query or "malformed")

    async def twice_per_sample(self, groups: Sequence[Group], permit: Permit) -> int:
        """The original: first the count, then the ids, of every well-formed sample."""
        return await self._ask(groups, permit, [{"rettype": "count"}, {}], lambda query: query)

    async def _ask(
        self,
        groups: Sequence[Group],
        permit: Permit,
        calls: Sequence[dict[str, str]],
        query_of: Callable[[str | None], str | None],
    ) -> int:
        """Make these calls for every sample that has a query, several samples at a time; the samples in time."""
        engine = PubMedEngine(self._settings)
        work = ((group, query) for group in groups for query in map(query_of, group.queries) if query is not None)

        async def ask_all(session: aiohttp.ClientSession, samples: Iterator[tuple[Group, str]]) -> None:
            for group, query in samples:
                form = engine.form(SearchRequest(query, retmax=self._task.top_k, max_date=group.row.max_date))
                for call in calls:
                    async with permit() as slot, session.post(self._settings.esearch_url, data=form | call) as reply:
                        slot.replied()
                        await reply.read()

        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
            for _ in range(2 * QUOTA_PER_S):
                tasks.create_task(ask_all(session, work))
        return GROUP * sum(not group.stale for group in groups)


@asynccontextmanager
async def quota_of(fleet: RewarderFleet, name: str) -> Any:
    """The quota of a fleet's broker, as a rewarder of this name gets it."""
    client = await fleet.join("rewarder", name)
    try:
        yield client.quota_slot
    finally:
        await client.close()


async def opened(permit: Permit) -> None:
    """Wait until the quota opens (a broker that starts keeps it closed at first)."""
    async with permit() as slot:
        slot.unused()
