"""Acceptance: plain BM25 on SciFact through `eval` is what is known of it, and what ir_measures makes of its run."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import ir_measures
import pytest

from deploy.cli import main

DATA = os.environ.get("DEEPRETRIEVAL_DATA")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DATA is None, reason="DEEPRETRIEVAL_DATA is not set"),
    pytest.mark.skipif(importlib.util.find_spec("pyserini") is None, reason="Lucene is not installed"),
]


def test_bm25_of_the_plain_claims(tmp_path: Path) -> None:
    corpus, run_file = Path(str(DATA)) / "scifact", tmp_path / "plain.run"
    flags = ["--model", "none", "--task", "ranking", "--engine", "bm25", "--split", "test", "--corpus", str(corpus)]
    settings = ["search.bm25.k1=0.9", "search.bm25.b=0.4"]
    out = tmp_path / "out"
    assert main(["eval", *flags, *settings, "--baselines", "--run-file", str(run_file), "--out", str(out)]) == 0
    methods = json.loads((out / "results.json").read_text())["methods"]
    figures = methods["raw request"]["metrics"]

    measures = {"ndcg@10": ir_measures.nDCG @ 10, "recall@100": ir_measures.R @ 100, "mrr": ir_measures.RR}
    judgments = [
        ir_measures.Qrel(query, document, int(grade))
        for query, document, grade in (
            line.split("\t") for line in (corpus / "qrels" / "test.tsv").read_text().splitlines()[1:]
        )
    ]
    found = ir_measures.calc_aggregate(measures.values(), judgments, ir_measures.read_trec_run(str(run_file)))
    for name, measure in measures.items():
        assert figures[name]["mean"] == pytest.approx(found[measure], abs=1e-9), name
    assert figures["ndcg@10"]["mean"] == pytest.approx(0.67, abs=0.01)
    assert figures["recall@100"]["mean"] == pytest.approx(0.90, abs=0.03)
    # As pyserini's set_rm3 ranks (tests/rewarders/retrieval/test_lucene.py).
    fed_back = methods["rm3"]["metrics"]
    assert (fed_back["ndcg@10"]["mean"], fed_back["recall@100"]["mean"]) == pytest.approx((0.646, 0.915), abs=0.002)
