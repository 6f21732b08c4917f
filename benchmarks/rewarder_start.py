"""How long does a rewarder take to start, and what does it weigh?

A real broker holds a group that waits to be scored; then `deepretrieval rewarder` is started against it, with the local
PubMed server to ask. Ready is when the scores of that group are with the learner: the rewarder has connected, was given
work, searched and answered, so the figure is a little longer than the start alone. Prints one JSON line:

* `ready_s`: seconds from the start of the process; median over the starts; `ready_s_all`: each of them;
* `rss_mb`: resident memory in 10^6 bytes after `--groups` groups were scored, the largest;
* `imports_torch`: whether a rewarder imported torch, or any other of `HEAVY`; `imports_heavy`: which ones.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from common.data.demo_world import build_demo_world

from benchmarks.rewarder_fleet import RewarderFleet
from benchmarks.search_process import SearchProcess
from common.data.rows import read_requests
from common.tasks import Row
from rewarders.servers.traffic import ServerSettings

HEAVY = ("torch", "vllm", "faiss", "transformers", "tokenizers", "jnius", "pyserini", "numpy", "pandas")
GROUP = 8
SCORED_WITHIN_S = 120.0
_IMPORTED = re.compile(r"^import time:[^|]*\|[^|]*\|\s*([\w.]+)", re.MULTILINE)


async def measure(fleet: RewarderFleet, rows: list[Row], starts: int, groups: int) -> dict[str, Any]:
    """Start rewarders one after the other."""
    ready, memory = [], []
    sent = 0
    for number in range(starts):
        await send_and_wait_at_broker(fleet, rows, sent)
        began = time.monotonic()
        process = fleet.start_rewarder(f"rewarder-{number}")
        await asyncio.wait_for(fleet.receive(), SCORED_WITHIN_S)
        ready.append(time.monotonic() - began)
        for more in range(1, groups):
            fleet.send(sent + more, *group(rows, sent + more))
            await asyncio.wait_for(fleet.receive(), SCORED_WITHIN_S)
        sent += groups
        memory.append(psutil.Process(process.pid).memory_info().rss / 1e6)
        process.terminate()
        await asyncio.to_thread(process.wait, SCORED_WITHIN_S)
    heavy = await heavy_imports(fleet, rows, sent)
    return {
        "ready_s": round(statistics.median(ready), 2),
        "rss_mb": round(max(memory), 1),
        "imports_torch": "torch" in heavy,
        "imports_heavy": heavy,
        "ready_s_all": [round(seconds, 2) for seconds in ready],
    }


async def heavy_imports(fleet: RewarderFleet, rows: list[Row], ticket: int) -> list[str]:
    """Which packages of `HEAVY` a rewarder has imported once it has scored a group."""
    name = "rewarder-imports"
    fleet.send(ticket, *group(rows, ticket))
    process = fleet.start_rewarder(name, {"PYTHONPROFILEIMPORTTIME": "1"})
    await asyncio.wait_for(fleet.receive(), SCORED_WITHIN_S)
    process.terminate()
    await asyncio.to_thread(process.wait, SCORED_WITHIN_S)
    imported = {module.partition(".")[0] for module in _IMPORTED.findall(fleet.log(name))}
    assert {"aiohttp", "rewarders"} <= imported, "the list of imports is not in the log"
    return sorted(imported.intersection(HEAVY))


async def send_and_wait_at_broker(fleet: RewarderFleet, rows: list[Row], ticket: int) -> None:
    """Send a group and wait until it stands in the queue for rewarders."""
    fleet.send(ticket, *group(rows, ticket))
    deadline = time.monotonic() + SCORED_WITHIN_S
    while not (await fleet.learner.fleet_status()).stages["score"].queued:
        assert time.monotonic() < deadline, "the group did not come to the broker"
        await asyncio.sleep(0.05)


def group(rows: list[Row], number: int) -> tuple[Row, list[str]]:
    """A request and eight answers to it."""
    row = rows[number % len(rows)]
    words = [word for word in row.text.split() if word.isalpha()]
    queries = [f"{words[sample % len(words)]} OR nothing{number}x{sample}" for sample in range(GROUP)]
    return row, [f'<answer>{{"query": "{query}"}}</answer>' for query in queries]


def main() -> None:
    """Measure and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=7)
    parser.add_argument("--groups", type=int, default=50, help="groups each of them scores")
    parser.add_argument("overrides", nargs="*", help="config overrides, as search.cache.mode=disk")
    arguments = parser.parse_args()

    async def run(folder: Path) -> dict[str, Any]:
        corpus = build_demo_world(folder / "world")
        rows = read_requests(corpus, "train")
        with SearchProcess("pubmed", ServerSettings(corpus=corpus, cache_folder=folder)) as server:
            settings = [f"search.url={server.base_url}", "task.reasoning=false", "search.retmax=50"]
            async with RewarderFleet(folder / "run", [*settings, *arguments.overrides]) as fleet:
                return await measure(fleet, rows, arguments.starts, arguments.groups)

    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(asyncio.run(run(Path(folder)))))


if __name__ == "__main__":
    main()
