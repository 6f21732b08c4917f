"""How long do clients of `deepretrieval serve` wait, and what does rewriting cost on top of vLLM's own endpoint?

`--concurrency` clients ask one after the other, without a pause, until all requests are answered. They ask in three
ways, in turns, on the same server:

* `chat`: vLLM's `/v1/chat/completions` with the task's messages, held to the task's pattern: the physical limit;
* `rewrite`: `POST /rewrite`, the same held generation, parsed;
* `search`: `POST /rewrite` with `search`, which also searches for every query on a local PubMed server.

Greedy, so that all generate the same tokens. The clients share the machine with the server. Prints one JSON line:

* per way `p50_s`, `p99_s` (of single answers, all rounds together) and `per_s` (median over the rounds);
* `ratio`, `search_ratio`: rate of `rewrite` and of `search` over that of `chat`, medians over the rounds;
* `alone_s`: median of `rewrite` for a client that has the server for itself;
* `lost`: requests without a good answer; `valid`: share of answers that parse;
* `requests`, `concurrency`: of a round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp

from actors.loop import STOP
from benchmarks.served_model import served
from common.config import Config, load_config
from common.tasks import ParsedAnswer, Row, Task
from common.tasks.from_config import task_of
from deploy.assets import prepare_assets
from deploy.evaluation.plan import read_rows

CONFIG: Final = Path(__file__).parents[1] / "configs" / "demo.yaml"
WAYS: Final = ("chat", "rewrite", "search")
TOP: Final = 10
ALONE: Final = 50
TIMEOUT_S: Final = 120

# Asks for one row; whether the answer parses.
Ask = Callable[[Row], Awaitable[bool]]


@dataclass
class Waits:
    """What the clients of one way saw."""

    seconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    valid: int = 0
    lost: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Hugging Face folder; default: the demo's, built on first use")
    parser.add_argument("--requests", type=int, default=1000, help="per way and round")
    parser.add_argument("--concurrency", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    given = [f"model.path={arguments.model.resolve()}"] if arguments.model else []
    config = load_config(CONFIG, ["data.heldout_split=train", *given])
    config = prepare_assets(config)
    rows, _, _ = read_rows(config, task_of(config), arguments.requests)
    words = ["--model", str(config.model.path), "--corpus", config.data.corpus, str(CONFIG), "actor.engine=vllm"]
    with tempfile.TemporaryDirectory() as folder, served(Path(folder) / "log", *words) as server:
        found = asyncio.run(measure(server.url, config, rows, arguments))
    print(json.dumps(found))


async def measure(url: str, config: Config, rows: Sequence[Row], arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds on a server that has been warmed up."""
    task = task_of(config)
    waits = {way: Waits() for way in WAYS}
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as http:
        asks = {
            "chat": await chat(http, task, config),
            "rewrite": rewrite(http, search=False),
            "search": rewrite(http, search=True),
        }
        alone = Waits()
        for way in WAYS:
            await ask_all(asks[way], rows[:ALONE], arguments.concurrency, Waits())
        await ask_all(asks["rewrite"], rows[:ALONE], 1, alone)
        for number in range(arguments.rounds):
            for way in WAYS if number % 2 == 0 else WAYS[::-1]:
                await ask_all(asks[way], rows, arguments.concurrency, waits[way])
            said = ", ".join(f"{way} {waits[way].rates[-1]:.0f}/s" for way in WAYS)
            print(f"round {number}: {said}", file=sys.stderr)
    return {
        **{way: shown(waits[way]) for way in WAYS},
        "ratio": ratio(waits["rewrite"], waits["chat"]),
        "search_ratio": ratio(waits["search"], waits["chat"]),
        "alone_s": round(statistics.median(alone.seconds), 4),
        "lost": sum(each.lost for each in waits.values()) + alone.lost,
        "valid": round(sum(each.valid for each in waits.values()) / (len(WAYS) * arguments.rounds * len(rows)), 4),
        "requests": len(rows),
        "concurrency": arguments.concurrency,
    }


async def ask_all(ask: Ask, rows: Sequence[Row], concurrency: int, waits: Waits) -> None:
    """Every row once, by as many clients as that; what they saw is added to `waits`."""
    left = iter(rows)

    async def client() -> None:
        for row in left:
            began = time.perf_counter()
            try:
                valid = await ask(row)
                waits.valid += valid
                waits.seconds.append(time.perf_counter() - began)
            except (aiohttp.ClientError, TimeoutError, KeyError, ValueError) as error:
                waits.lost += 1
                print(f"lost: {error!r}", file=sys.stderr)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    waits.rates.append(len(rows) / (time.perf_counter() - began))


def rewrite(http: aiohttp.ClientSession, *, search: bool) -> Ask:
    """By `POST /rewrite`."""

    async def ask(row: Row) -> bool:
        async with http.post("/rewrite", json={"request": row.text, "search": search, "top": TOP}) as reply:
            reply.raise_for_status()
            (answer,) = (await reply.json())["rewrites"]
        if answer["request"] != row.text or (search and answer["found"] is None):
            raise ValueError(f"not what was asked for: {answer}")
        return not answer["invalid"]

    return ask


async def chat(http: aiohttp.ClientSession, task: Task, config: Config) -> Ask:
    """By vLLM's chat endpoint, with what `/rewrite` asks the model for."""
    async with http.get("/v1/models") as reply:
        name = (await reply.json())["data"][0]["id"]
    options = {
        "model": name,
        "temperature": 0.0,
        "max_tokens": config.sampling.max_tokens,
        "structured_outputs": {"regex": task.answer_pattern},
        "stop": [STOP],
        "include_stop_str_in_output": True,
    }

    async def ask(row: Row) -> bool:
        body = {**options, "messages": task.messages(row)}
        async with http.post("/v1/chat/completions", json=body) as reply:
            reply.raise_for_status()
            text = (await reply.json())["choices"][0]["message"]["content"]
        return isinstance(task.parse(task.closed(text) or text), ParsedAnswer)

    return ask


def ratio(ours: Waits, limit: Waits) -> float:
    """Median over the rounds."""
    return round(statistics.median(mine / most for mine, most in zip(ours.rates, limit.rates, strict=True)), 3)


def shown(waits: Waits) -> dict[str, float]:
    """The figures of one way."""
    cuts = statistics.quantiles(waits.seconds, n=100)
    return {
        "p50_s": round(cuts[49], 3),
        "p99_s": round(cuts[98], 3),
        "per_s": round(statistics.median(waits.rates), 1),
    }


if __name__ == "__main__":
    main()
