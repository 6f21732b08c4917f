"""Keys with a recognisable value: a real run against a service that quotes them leaves them in none of its files."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sqlite3
import threading
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from common.config import load_config
from deploy.assets import prepare_corpus
from rewarders.cache.found import decode_found
from rewarders.engines.api_keys import HIDDEN
from rewarders.servers.hosting import host
from rewarders.servers.pubmed import ServerSettings
from rewarders.servers.pubmed.app import PubMedApp
from rewarders.servers.pubmed.index import Index
from tests.deploy.small_run import ROOT, SMALL, SmallRun

NCBI_KEY = "f00dfacef00dfacef00dfacef00dfacef00d"
WANDB_KEY = "beefbeefbeefbeefbeefbeefbeefbeefbeefbeef"
SETTINGS = (
    *SMALL,
    "learner.steps=2",
    "actor.count=1",
    "sampling.max_tokens=24",
    "data.heldout_limit=4",
    "search.cache.mode=record",
    "search.attempts=6",
    "search.breaker.failures=50",
    "tracking.wandb=offline",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class QuotingService:
    """Our PubMed server with faults, which quotes the caller's key everywhere. NCBI does so in some of its errors."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.refused: set[str] = set()
        self._turns = itertools.count()

    @web.middleware
    async def quote(self, request: web.Request, handler: Any) -> web.StreamResponse:
        form = await request.post()
        key, term = str(form.get("api_key", "")), str(form.get("term", ""))
        self.keys.add(key)
        turn = next(self._turns)
        if turn % 23 == 7:
            return web.json_response({"error": "API key invalid", "api-key": key, "type": "invalid"}, status=400)
        if turn % 23 == 11:
            return web.Response(text=f"<html><h1>500</h1> api_key={key}</html>", status=500, content_type="text/html")
        if zlib.crc32(term.encode()) % 5 == 0 and term != "cancer":
            self.refused.add(term)
            return web.json_response({"esearchresult": {"ERROR": f"Search Backend failed: no field in {key}"}})
        response = await handler(request)
        return self._with_remarks(response, key)

    def _with_remarks(self, response: web.StreamResponse, key: str) -> web.StreamResponse:
        try:
            document = json.loads(response.text or "") if isinstance(response, web.Response) else {}
        except ValueError:
            return response
        answer = document.get("esearchresult", {})
        if "idlist" not in answer:
            return response
        answer |= {"querytranslation": f"api_key={key}", "warninglist": {"outputmessages": [f"of {key}"]}}
        return web.json_response(document)


@contextmanager
def served(service: QuotingService, corpus: Path, cache: Path) -> Iterator[str]:
    """The address of the service, which runs in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> web.AppRunner:
        settings = ServerSettings(corpus=corpus, cache_folder=cache, fault_rate=0.1, fault_late_s=0.1)
        application = PubMedApp(Index.of_corpus(corpus, cache), settings).application()
        application.middlewares.append(service.quote)
        return await host(application, "127.0.0.1", 0)

    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(60)
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def contents(path: Path) -> Iterator[bytes]:
    """What is in a file, and the results that are packed in it."""
    yield path.read_bytes()
    if path.suffix == ".sqlite":
        with closing(sqlite3.connect(path)) as table:
            for (value,) in table.execute("SELECT value FROM searches"):
                yield repr(decode_found(value)).encode()


def test_no_file_of_a_run_holds_a_key(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCBI_API_KEY", NCBI_KEY)
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    monkeypatch.setenv("DEEPRETRIEVAL_DEBUG", "1")
    service = QuotingService()
    monkeypatch.setenv("DEEPRETRIEVAL_CACHE", os.environ.get("DEEPRETRIEVAL_CACHE", str(demo_folder / "cache")))
    corpus = prepare_corpus(load_config(ROOT / "configs" / "demo.yaml"))
    with served(service, corpus, demo_folder / "index") as url:
        run = SmallRun(demo_folder, "keys", (*SETTINGS, f"search.url={url}"))
        try:
            output = run.start().finish()
        finally:
            run.end()
    assert service.keys == {NCBI_KEY}
    assert service.refused, "no refusal has reached the samples"
    names = "config, logs, metrics, samples, W&B's files and the searches of the run"
    files = [path for path in run.folder.path.rglob("*") if path.is_file()]
    assert {".wandb", ".sqlite", ".log", ".jsonl", ".yaml"} <= {path.suffix for path in files}, names
    for key in (NCBI_KEY, WANDB_KEY):
        assert key not in output
        assert [path for path in files if any(key.encode() in content for content in contents(path))] == []
    [recording] = run.folder.searches.glob("*.sqlite")
    assert any(HIDDEN in content for content in contents(recording)), "what the service says is kept, without the key"
