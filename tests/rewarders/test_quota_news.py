"""What the broker's quota hears of the answers an engine gets: rate headers, refusals, pauses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from common.adaptive_quota import CALM_REPLIES
from common.broker.service import BrokerSettings
from common.transport.client import BrokerClient
from common.transport.keys import create_run_keys
from rewarders.engines.base import EngineThrottled, EngineUnavailable, SearchRequest
from rewarders.engines.pubmed import PubMedEngine
from tests.common.broker_world import RunningBroker, peer, status_when
from tests.rewarders.fake_ncbi import RATE_LIMIT, FakeNcbi, good
from tests.rewarders.fake_upstream import Parameters, running

REQUEST = SearchRequest("aspirin", retmax=3)


@asynccontextmanager
async def asked_through_a_quota(tmp_path: Path, ncbi: FakeNcbi) -> AsyncIterator[tuple[PubMedEngine, BrokerClient]]:
    create_run_keys(tmp_path / "keys")
    quota = (20, 0.2, 0.3)
    broker = RunningBroker(tmp_path / "keys", BrokerSettings(1, heartbeat_s=0.1, quota=quota, quota_mode="adaptive"))
    try:
        async with (
            peer(broker.endpoint, tmp_path / "keys", "rewarder") as client,
            ncbi.engine(permit=client.quota_slot) as engine,
        ):
            yield engine, client
    finally:
        await asyncio.to_thread(broker.stop)


async def test_rate_headers_earn_trust(tmp_path: Path) -> None:
    def with_headers(form: Parameters) -> web.Response:
        response = good(form)
        response.headers.update({"X-RateLimit-Limit": "20", "X-RateLimit-Remaining": "19"})
        return response

    async with running(FakeNcbi()) as ncbi, asked_through_a_quota(tmp_path, ncbi) as (engine, client):
        for _ in range(CALM_REPLIES + 5):  # without headers
            await engine.search(REQUEST)
        assert (await client.fleet_status()).quota_phase == "adaptive, strict for now"
        ncbi.respond = with_headers
        for _ in range(CALM_REPLIES):
            await engine.search(REQUEST)
        await status_when(client, lambda status: status.quota_phase == "adaptive")


@pytest.mark.parametrize(
    ("status", "headers", "refused"),
    [(429, {}, 1), (429, {"Retry-After": "30"}, 1), (200, {}, 1), (503, {"Retry-After": "2"}, 0)],
)
async def test_refusals_and_pauses_are_for_everybody(
    tmp_path: Path, status: int, headers: dict[str, str], refused: int
) -> None:
    def refuse(form: Parameters) -> web.Response:
        body = {"error": "down"} if status == 503 else RATE_LIMIT
        return web.json_response(body, status=status, headers=headers)

    async with running(FakeNcbi()) as ncbi, asked_through_a_quota(tmp_path, ncbi) as (engine, client):
        ncbi.respond = refuse
        with pytest.raises(EngineUnavailable) as raised:
            await engine.search(REQUEST)
        assert isinstance(raised.value, EngineThrottled) == bool(refused)
        told = await status_when(client, lambda fleet: "asked for a pause" in fleet.quota_waits_for)
        assert told.slots_refused == refused
