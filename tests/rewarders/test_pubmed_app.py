"""The local PubMed over real HTTP: wire format, errors, quota, latency, start and stop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewarders.servers.pubmed import Index, RunningServer, SearchServerError, ServerSettings, serve
from rewarders.servers.pubmed.parameters import MAX_RESULTS
from rewarders.servers.quota import SlidingLog

DATA = os.environ.get("DEEPRETRIEVAL_DATA")
needs_recorded = pytest.mark.skipif(DATA is None, reason="needs DEEPRETRIEVAL_DATA")
DOCUMENTS = 30


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("served")
    rows = [
        {
            "_id": str(1000 + n),
            "title": f"Heart study {n}",
            "text": f"Aspirin & word{n}.",
            "metadata": {"pub_date": str(2020 - n)},
        }
        for n in range(DOCUMENTS)
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Index.of_corpus(folder, folder / "cache")


class Client:
    """What one client of a running server sees."""

    def __init__(self, server: RunningServer, session: aiohttp.ClientSession) -> None:
        self.server = server
        self.session = session

    async def post(self, **parameters: str) -> tuple[int, dict[str, Any], Any]:
        form = {"db": "pubmed", "retmode": "json", **parameters}
        async with self.session.post(self.server.esearch_url, data=form) as response:
            return response.status, await response.json(), response.headers

    async def search(self, term: str, **parameters: str) -> dict[str, Any]:
        status, body, _ = await self.post(term=term, **parameters)
        assert status == 200
        assert body["header"] == {"type": "esearch", "version": "0.3"}
        return body["esearchresult"]

    async def get_text(self, **parameters: str) -> tuple[int, str]:
        async with self.session.get(self.server.esearch_url, params=parameters) as response:
            return response.status, await response.text()


def settings_of(**changes: Any) -> ServerSettings:
    return ServerSettings(corpus=Path("unused"), **changes)


@pytest.fixture
async def client(index: Index) -> AsyncIterator[Client]:
    async with await serve(settings_of(), index) as server, aiohttp.ClientSession() as session:
        yield Client(server, session)


async def test_a_search_by_post_and_get(client: Client) -> None:
    found = await client.search("heart[ti]", retmax="3", retstart="1", sort="pub_date")
    assert found == {
        "count": "30",
        "retmax": "3",
        "retstart": "1",
        "idlist": ["1001", "1002", "1003"],
        "translationset": [],
        "querytranslation": '"heart"[Title]',
    }
    status, text = await client.get_text(db="pubmed", term="heart[ti]", retmax="3", retstart="1", retmode="json")
    assert (status, json.loads(text)["esearchresult"]) == (200, found)


async def test_defaults_and_odd_numbers(client: Client) -> None:
    assert len((await client.search("heart"))["idlist"]) == 20
    assert len((await client.search("heart", retmax="many", retstart="-1"))["idlist"]) == 20
    assert (await client.search("heart", retmax="0"))["idlist"] == []
    assert (await client.search("heart", rettype="count")) == {"count": "30"}
    assert (await client.search("heart", retstart="30"))["idlist"] == []


async def test_dates_bound_the_publication_date(client: Client) -> None:
    found = await client.search("heart", mindate="2010", maxdate="2012/06/30", datetype="pdat")
    assert found["idlist"] == ["1008", "1009", "1010"]
    assert found["querytranslation"] == '"heart"[All Fields] AND 2010/01/01:2012/06/30[Date - Publication]'
    alone = await client.search("heart", maxdate="2012")
    assert alone["count"] == "30"
    assert "used together" in alone["warninglist"]["outputmessages"][0]


async def test_relevance_and_unknown_sort(client: Client) -> None:
    assert (await client.search("word7 OR heart", sort="relevance"))["idlist"][0] == "1007"
    odd = await client.search("heart", sort="beauty")
    assert odd["idlist"][0] == "1000"
    assert odd["warninglist"]["outputmessages"] == ["Unknown sort schema 'beauty' ignored"]


async def test_errors_and_warnings_appear_only_where_there_are_any(client: Client) -> None:
    found = await client.search('the zqxjv AND heart[zz] OR "aspirin heart"')
    assert found["errorlist"] == {"phrasesnotfound": ["zqxjv"], "fieldsnotfound": ["[zz]"]}
    assert found["warninglist"] == {
        "phrasesignored": ["the"],
        "quotedphrasesnotfound": ['"aspirin heart"'],
        "outputmessages": [],
    }
    nothing = await client.search("heart NOT aspirin")
    assert (nothing["count"], nothing["idlist"]) == ("0", [])
    assert nothing["warninglist"]["outputmessages"] == ["No items found."]
    assert "errorlist" not in nothing


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"term": "(("}, "Search Backend failed: Exception:\n'term' cannot be parsed: unbalanced"),
        ({"term": " "}, "Empty term and query_key - nothing todo"),
        ({"term": "heart", "db": "gap"}, "Invalid db name specified: gap"),
        (
            {"term": "heart", "retstart": str(MAX_RESULTS)},
            "Search Backend failed: Exception:\n'retstart' cannot be",
        ),
    ],
)
async def test_failures_come_with_status_200(client: Client, parameters: dict[str, str], message: str) -> None:
    status, body, _ = await client.post(**parameters)
    assert status == 200
    assert body["esearchresult"]["ERROR"].startswith(message)
    assert set(body["esearchresult"]) == {"ERROR"}
    status, text = await client.get_text(**parameters)
    assert status == 200
    assert (ET.fromstring(text).findtext("ERROR") or "").startswith(message)


async def test_blank_key_and_long_url(client: Client) -> None:
    status, body, _ = await client.post(term="heart", api_key=" ")
    assert status == 400
    assert body == {"error": "API key invalid", "api-key": " ", "type": "invalid", "status": "unknown"}
    status, _ = await client.get_text(term="x" * 9_000)
    assert status == 414
    assert (await client.search("heart OR " * 1_500 + "lung"))["count"] == "30"


async def test_no_more_than_the_first_9999_results(tmp_path: Path) -> None:
    lines = (json.dumps({"_id": f"d{n}", "title": "same", "text": ""}) + "\n" for n in range(10_050))
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    settings = ServerSettings(corpus=tmp_path, cache_folder=tmp_path / "cache")
    async with await serve(settings) as server, aiohttp.ClientSession() as session:
        client = Client(server, session)
        found = await client.search("same", retmax="20000")
        assert (found["count"], len(found["idlist"])) == ("10050", MAX_RESULTS)
        last = await client.search("same", retmax="100", retstart="9990")
        assert last["idlist"] == [f"d{n}" for n in range(59, 50, -1)]  # newest first: the file counts down


async def test_health(client: Client) -> None:
    await client.search("heart")
    async with client.session.get(f"{client.server.base_url}/health") as response:
        assert await response.json() == {"status": "ok", "documents": DOCUMENTS, "requests": 1, "refused": 0}


async def test_quota_per_key_with_ncbis_body_and_headers(index: Index) -> None:
    settings = settings_of(quota=3, window_s=0.5, retry_after_s=2)
    async with await serve(settings, index) as server, aiohttp.ClientSession() as session:
        client = Client(server, session)
        answers = [await client.post(term="heart", api_key="k1") for _ in range(5)]
        assert [status for status, _, _ in answers] == [200, 200, 200, 429, 429]
        assert [headers["X-RateLimit-Remaining"] for _, _, headers in answers] == ["2", "1", "0", "0", "0"]
        assert {headers["X-RateLimit-Limit"] for _, _, headers in answers} == {"3"}
        assert answers[4][1] == {
            "error": "API rate limit exceeded",
            "api-key": "k1",
            "count": "5",
            "limit": "3",
        }
        assert answers[4][2]["Retry-After"] == "2"
        assert "Retry-After" not in answers[0][2]
        keyless = await client.post(term="heart")
        assert keyless[0] == 200
        for _ in range(3):
            keyless = await client.post(term="heart")
        assert (keyless[0], keyless[1]["api-key"]) == (429, "127.0.0.1")
        await asyncio.sleep(0.55)
        assert (await client.post(term="heart", api_key="k1"))[0] == 200


@given(
    gaps=st.lists(st.floats(0, 0.5), min_size=1, max_size=60),
    limit=st.integers(1, 5),
    window=st.floats(0.2, 2.0),
)
def test_sliding_log_never_admits_more_and_never_refuses_needlessly(
    gaps: list[float], limit: int, window: float
) -> None:
    log = SlidingLog(limit, window)
    now, admitted = 0.0, []
    for gap in gaps:
        now += gap
        recent = [time_ for time_ in admitted if time_ > now - window]
        verdict = log.admit(now)
        assert verdict.admitted == (len(recent) < limit)
        if verdict.admitted:
            admitted.append(now)
        assert verdict.remaining == limit - len(recent) - verdict.admitted


async def test_latency_is_added_and_does_not_add_up(index: Index) -> None:
    settings = settings_of(latency_ms=150, jitter_ms=50)
    async with await serve(settings, index) as server, aiohttp.ClientSession() as session:
        client = Client(server, session)
        await client.search("heart")
        started = time.monotonic()
        await asyncio.gather(*(client.search("heart") for _ in range(20)))
        assert 0.15 <= time.monotonic() - started < 1.5


async def test_a_taken_port_is_one_clear_line(index: Index) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SearchServerError, match=rf"127\.0\.0\.1:{port} is in use"):
            await serve(settings_of(port=port), index)
    with pytest.raises(SearchServerError, match=r"cannot listen on 127\.0\.0\.1:70000"):
        await serve(settings_of(port=70_000), index)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(SearchServerError, match="negative"):
        settings_of(latency_ms=-1)
    with pytest.raises(SearchServerError, match="quota"):
        settings_of(quota=0)


_SERVE = """
import sys
from pathlib import Path
from rewarders.servers.pubmed import ServerSettings, run
assert not {"torch", "transformers", "vllm"} & set(sys.modules)
run(ServerSettings(corpus=Path(sys.argv[1]), cache_folder=Path(sys.argv[1]) / "cache", latency_ms=1, quota=9))
print("stopped")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_says_where_it_listens_and_stops_on_signals(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"_id": "1", "title": "heart", "text": ""}\n')
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", _SERVE, str(tmp_path)]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(number)
        rest, errors = process.communicate(timeout=30)
    assert line.startswith("PubMed search server: http://127.0.0.1:")
    assert "1 documents, latency 1 ms + up to 0 ms, quota 9 per 1 s" in line
    assert (process.returncode, rest, errors) == (0, "stopped\n", "")


# Recorded answers of the real service.


def _recorded(name: str) -> str:
    assert DATA is not None
    return (Path(DATA) / name).read_text()


def _shape(value: Any) -> Any:
    """Types only: what must be the same in our answers and in recorded ones."""
    if isinstance(value, dict):
        return {key: _shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return sorted({type(inner).__name__ for inner in value})
    return type(value).__name__


@needs_recorded
async def test_json_has_the_shape_of_recorded_answers(client: Client) -> None:
    folder = Path(str(DATA)) / "fixtures_pubmed" / "biomcp_testdata"
    bodies = [json.loads(path.read_text()) for path in sorted(folder.glob("variant_articles_*.json"))]
    results = [body for body in bodies if "esearchresult" in body]
    assert len(results) == 3
    for recorded in results:
        # One of the recorded queries holds a word that PubMed does not know: it is dropped and reported.
        unknown = "errorlist" in recorded["esearchresult"]
        _, ours, _ = await client.post(term="heart p.E1317Q" if unknown else "heart[tiab] AND aspirin[tiab]")
        assert list(ours["esearchresult"]) == list(recorded["esearchresult"])
        # No terms are mapped here, so the list of mappings stays empty.
        recorded["esearchresult"]["translationset"] = []
        assert _shape(ours) == _shape(recorded)
        if unknown:
            assert ours["esearchresult"]["errorlist"] == recorded["esearchresult"]["errorlist"]
    _, ours, _ = await client.post(term="PTEN[tiab] AND D326N[tiab]")
    assert ours["esearchresult"]["querytranslation"] == results[0]["esearchresult"]["querytranslation"]


@needs_recorded
async def test_429_is_the_recorded_body(index: Index) -> None:
    recorded = next(e for e in json.loads(_recorded("fixtures_errors/error_bodies.json")) if e["http_status"] == 429)
    async with (
        await serve(settings_of(quota=3, window_s=30), index) as server,
        aiohttp.ClientSession() as session,
    ):
        for _ in range(4):
            async with session.post(server.esearch_url, data={"term": "heart"}) as response:
                text = await response.text()
    assert response.status == 429
    assert text.replace("127.0.0.1", "203.0.113.7") == recorded["body"]


@needs_recorded
async def test_error_is_the_recorded_one(client: Client) -> None:
    entries = json.loads(_recorded("fixtures_errors/error_bodies.json"))
    recorded = next(json.loads(e["body"]) for e in entries if "Invalid db" in (e["body"] or ""))
    _, body, _ = await client.post(term="heart", db="nonsense_db")
    assert body["esearchresult"] == recorded["esearchresult"]


@needs_recorded
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("esearch1.xml", {"term": "heart"}), ("esearch8.xml", {"term": "abcXYZ"})],
)
async def test_xml_has_the_elements_of_recorded_answers(client: Client, name: str, parameters: dict[str, str]) -> None:
    recorded = _recorded(f"fixtures_pubmed/biopython_Tests_Entrez/{name}")
    status, text = await client.get_text(**parameters)
    assert status == 200
    assert text.split("<eSearchResult>")[0] == recorded.split("<eSearchResult>")[0]
    ours, theirs = ET.fromstring(text), ET.fromstring(recorded)
    assert [element.tag for element in ours] == [element.tag for element in theirs]
    assert {element.tag for element in ours.iter()} == {element.tag for element in theirs.iter()}
    assert len(ours.findall("IdList/Id")) == len(theirs.findall("IdList/Id"))
