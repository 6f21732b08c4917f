"""`search-server`: what a config describes is what the command starts, and it ends without leaving anything behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from common.config import Config
from deploy.cli import _parse
from deploy.engines import engine_of
from deploy.search_server_command import options_of, section_of
from rewarders.engines.base import SearchRequest
from rewarders.engines.retrieval import RetrievalEngine


def config_of(engine: str, **search: Any) -> Config:
    return Config.model_validate({"search": {"engine": engine, "url": "http://127.0.0.1:1", **search}})


@pytest.mark.parametrize("engine", ["pubmed", "ctgov", "bm25", "dense"])
def test_every_key_of_the_section_reaches_the_command(engine: str) -> None:
    sections = {
        "bm25": {"k1": 1.5, "b": 0.25, "syntax": "boolean", "processes": 2, "threads": 3},
        "dense": {
            "encoder": "some/encoder", "pooling": "cls", "query_prefix": "query: ", "passage_prefix": "-passage: ",
            "normalize": False, "max_tokens": 100, "index": "hnsw", "hnsw_m": 8, "hnsw_ef_construction": 9,
            "hnsw_ef_search": 10, "gpu": True, "batch": 7, "threads": 5,
        },
    }  # fmt: skip
    config = config_of(engine, quota={"requests": 3, "window_s": 2.0}, latency_ms=4.0, **sections)
    arguments = _parse(["search-server", *options_of(config)])
    assert (arguments.kind, arguments.quota, arguments.window, arguments.latency_ms) == (engine, 3, 2.0, 4.0)
    if engine in sections:
        assert section_of(arguments).model_dump() | sections[engine] == section_of(arguments).model_dump()
        assert section_of(arguments) == getattr(config.search, engine)


@pytest.mark.parametrize("engine", ["bm25", "dense"])
def test_defaults_are_those_of_the_config(engine: str) -> None:
    own = getattr(Config().search, engine)
    assert section_of(_parse(["search-server", engine, "--corpus", "c"])) == own
    assert section_of(_parse(["search-server", *options_of(config_of(engine))])) == own
    assert isinstance(engine_of(config_of(engine)), RetrievalEngine)


@pytest.mark.parametrize("wrong", ["--b=2", "--k1=x", "--syntax=sql", "--processes=0"])
def test_values_a_config_would_not_take_are_named(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parse(["search-server", "bm25", "--corpus", "c", wrong])
    assert f"argument {wrong.partition('=')[0]}: Input should be" in capsys.readouterr().err


async def test_bm25_serves_until_a_signal(tmp_path: Path) -> None:
    pytest.importorskip("pyserini", reason="the extra lucene is not installed")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    lines = [{"_id": f"d{n}", "title": f"title {n}", "text": "heart attack" if n % 2 else "heart"} for n in range(6)]
    (corpus / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = [sys.executable, "-m", "deploy.cli", "search-server", "bm25", "--corpus", str(corpus), "--port", "0"]
    environment = {**os.environ, "DEEPRETRIEVAL_CACHE": str(tmp_path / "cache")}
    server = subprocess.Popen([*command, "--syntax", "boolean"], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        url = line[line.index("http://") :].split("/search")[0]
        config = Config.model_validate({"search": {"engine": "bm25", "url": url}})
        async with engine_of(config) as engine:
            await engine.check()
            found = await engine.search(SearchRequest("heart NOT attack", 9, with_texts=True))
        assert (found.ids, found.texts) == (("d0", "d2", "d4"), ("heart",) * 3)
        workers = _children(server.pid)
        assert len(workers) == 1
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(timeout=60)
    assert status == 0
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        time.sleep(0.05)


def _children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(entry.parent.name))
    return found
