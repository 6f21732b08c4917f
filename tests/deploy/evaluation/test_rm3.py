"""RM3 among the baselines of an evaluation by BM25, with real Lucene."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deploy.cli import main
from tests.rewarders.retrieval.worlds import topical_texts, write_corpus

pytest.importorskip("pyserini", reason="the extra lucene is not installed")
REQUESTS = 12


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Requests that name two words of a topic; documents of the topic are relevant whether they hold them or not."""
    folder = write_corpus(tmp_path / "corpus", topical_texts())
    queries = [{"_id": f"q{topic}", "text": f"t{topic}w1 common t{topic}w3"} for topic in range(REQUESTS)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    (folder / "qrels").mkdir()
    judged = "".join(f"q{t}\tn{number:03}\t1\n" for t in range(REQUESTS) for number in range(t, 240, 40))
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return folder


def arguments(corpus: Path, out: Path, *options: str) -> list[str]:
    fixed = ["--model", "none", "--task", "ranking", "--engine", "bm25", "--split", "dev", "--corpus", str(corpus)]
    return ["eval", *fixed, "--out", str(out), "--baselines", "search.retmax=20", *options]


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def test_it_is_a_method_like_the_others(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, run_file = tmp_path / "out", tmp_path / "plain.run"
    assert main(arguments(corpus, out, "--run-file", str(run_file))) == 0
    table = (out / "table.md").read_text()
    assert table.count("| RM3 of the request |") == 2, "among the methods and among the differences"
    found = results(out)
    plain, fed_back = (found["methods"][name] for name in ("raw request", "rm3"))
    assert fed_back["metrics"]["recall@10"]["mean"] > plain["metrics"]["recall@10"]["mean"]
    assert (fed_back["queries"], fed_back["calls"]) == (REQUESTS, REQUESTS), "nothing of the raw request's is reused"
    gain = found["differences"]["rm3"]["recall@10"]
    expected = plain["metrics"]["recall@10"]["mean"] - fed_back["metrics"]["recall@10"]["mean"]
    assert (gain["mean"], gain["queries"]) == (pytest.approx(expected), REQUESTS)

    kept = (out / "baselines" / "rm3.jsonl").read_bytes().splitlines(keepends=True)
    assert json.loads(kept[0])["ranking"] != json.loads((out / "queries.jsonl").read_text().splitlines()[0])["ranking"]
    (out / "baselines" / "rm3.jsonl").write_bytes(b"".join(kept[:5]) + kept[5][:20])
    assert main(arguments(corpus, out, "--run-file", str(run_file))) == 0, "it was killed half-way"
    again = results(out)["methods"]["rm3"]
    assert again["metrics"] == fed_back["metrics"]
    assert (out / "baselines" / "rm3.jsonl").read_bytes().startswith(b"".join(kept[:5]))
    assert main(arguments(corpus, out, "search.bm25.k1=1.2")) == 1
    assert "another engine" in capsys.readouterr().err


def test_a_recording_holds_it_apart_from_the_plain_search(corpus: Path, tmp_path: Path) -> None:
    recorded = ("search.cache.mode=record", f"search.cache.folder={tmp_path / 'recording'}", "--limit", "5")
    boolean = "search.bm25.syntax=boolean"
    assert main(arguments(corpus, tmp_path / "live", boolean, *recorded)) == 0
    replay = (boolean, "--replay", str(tmp_path / "recording"), "--limit", "5")
    assert main(arguments(corpus, tmp_path / "again", *replay)) == 0
    live, again = (results(tmp_path / name)["methods"] for name in ("live", "again"))
    assert {name: method["metrics"] for name, method in live.items()} == {
        name: method["metrics"] for name, method in again.items()
    }
    assert live["rm3"]["metrics"] != live["or_all"]["metrics"]
