"""A small collection of trials, and what a client sees of a server over it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from rewarders.servers.ctgov import Index, RunningServer, ServerSettings, serve

TRIALS = 30


def record(number: int) -> dict[str, Any]:
    """Trial n was first posted in the year 2020 - n; word n is in its title only."""
    return {
        "protocolSection": {
            "identificationModule": {"nctId": f"NCT{number:08d}", "briefTitle": f"Heart study word{number}"},
            "statusModule": {
                "overallStatus": "COMPLETED" if number % 2 else "RECRUITING",
                "studyFirstPostDateStruct": {"date": f"{2020 - number}-06-15", "type": "ACTUAL"},
            },
            "conditionsModule": {"conditions": ["Angina & más", "Größe"]},
            "designModule": {"phases": ["PHASE3"], "enrollmentInfo": {"count": number}} if number < 10 else {},
            "armsInterventionsModule": {"interventions": [{"type": "DRUG", "name": "Aspirin"}]},
        },
        "hasResults": False,
    }


def small_index(folder: Path) -> Index:
    (folder / "studies.json").write_text(json.dumps([record(number) for number in range(TRIALS)]))
    return Index.of_corpus(folder, folder / "cache")


def settings_of(**changes: Any) -> ServerSettings:
    return ServerSettings(corpus=Path("unused"), **changes)


class Client:
    """What one client of a running server sees."""

    def __init__(self, server: RunningServer, session: aiohttp.ClientSession) -> None:
        self.server = server
        self.session = session

    async def get(self, **parameters: str) -> tuple[int, str, Any]:
        """`query_term` stands for `query.term`."""
        named = {name.replace("_", "."): value for name, value in parameters.items()}
        async with self.session.get(self.server.studies_url, params=named) as response:
            return response.status, await response.text(), response.headers

    async def page(self, **parameters: str) -> dict[str, Any]:
        status, text, headers = await self.get(**parameters)
        assert (status, headers["Content-Type"].split(";")[0]) == (200, "application/json"), text
        body: dict[str, Any] = json.loads(text)
        return body

    async def ids(self, **parameters: str) -> list[str]:
        body = await self.page(**{"fields": "NCTId", "pageSize": "1000", **parameters})
        return [study["protocolSection"]["identificationModule"]["nctId"] for study in body["studies"]]

    async def numbers(self, **parameters: str) -> list[int]:
        return [int(trial.removeprefix("NCT")) for trial in await self.ids(**parameters)]

    async def refusal(self, **parameters: str) -> str:
        status, text, headers = await self.get(**parameters)
        assert (status, headers["Content-Type"].split(";")[0]) == (400, "text/plain"), text
        return text


@asynccontextmanager
async def served(index: Index, **changes: Any) -> AsyncIterator[Client]:
    async with await serve(settings_of(**changes), index) as server, aiohttp.ClientSession() as session:
        yield Client(server, session)
