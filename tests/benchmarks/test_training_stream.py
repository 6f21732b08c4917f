"""The training stream of the throughput benchmark, and the counting of what is asked for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quota_rivals import compare_clients, stretch_of
from benchmarks.quota_units import QUOTA_PER_S, work_off
from benchmarks.search_process import SearchProcess
from benchmarks.training_stream import GROUP, PHASES, Group, StreamWriter, statistics_of
from common.data.rows import read_requests
from common.data.worlds.publications import build_world
from common.tasks import ParsedAnswer, Row
from common.tasks.publication_search import PublicationSearch
from rewarders.servers.traffic import ServerSettings

ROWS = [Row(f"q{number}", "aspirin against pain in adults", (str(number),)) for number in range(50)]


def writer(seed: int = 0, malformed: float = 0.15, stale: float = 0.05) -> StreamWriter:
    return StreamWriter(ROWS, malformed, stale, seed)


def test_the_stream_repeats_itself_as_was_counted_and_is_the_seeds() -> None:
    groups = list(writer().generated(4000))
    assert groups == list(writer().generated(4000))
    assert groups != list(writer(seed=1).generated(4000))
    phases = [statistics_of(groups[start : start + 800]) for start in range(0, 4000, 800)]
    for measured, phase in zip(phases, PHASES, strict=True):
        assert measured["equal_pairs"] == pytest.approx(phase.equal_pairs, abs=0.006)
    whole = statistics_of(groups)
    assert whole["malformed"] == pytest.approx(0.15, abs=0.01)
    assert whole["stale"] == pytest.approx(0.05, abs=0.015)
    assert whole["repeated_at_all"] > whole["repeated_in_group"] > 0


def test_texts_are_malformed_where_there_is_no_query() -> None:
    task = PublicationSearch()
    for group in writer().generated(200):
        for text, query in zip(group.texts, group.queries, strict=True):
            answer = task.parse(text)
            assert (answer.query if isinstance(answer, ParsedAnswer) else None) == query


def test_a_run_can_be_read_in_its_place(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "ticket": ticket, "prompt_id": f"q{ticket}", "query": f"aspirin{sample % 3}"}
        for ticket in range(3)
        for sample in range(GROUP if ticket else 4)  # the first group has not all of its samples
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    groups = list(writer(malformed=0.0).recorded(tmp_path / "samples.jsonl"))
    assert [group.row.id for group in groups] == ["q1", "q2"]
    assert groups[0].queries == tuple(f"aspirin{sample % 3}" for sample in range(GROUP))


async def test_units_are_the_different_queries_of_the_groups_that_are_wanted(tmp_path: Path) -> None:
    world = build_world(tmp_path / "world", documents=200, train_requests=20, test_requests=5)
    rows = read_requests(world, "train")
    groups = [
        *StreamWriter(rows, 0.15, 0.2, seed=3).generated(60),
        Group(rows[0], ("<answer>",) * GROUP, (None,) * GROUP, stale=True),
    ]
    wanted = {
        (group.row.max_date, query)
        for group in groups
        if not group.stale
        for query in group.queries
        if query is not None
    }
    with SearchProcess("pubmed", ServerSettings(corpus=world, cache_folder=tmp_path)) as server:
        report = await work_off(groups, PublicationSearch(top_k=50), server.base_url)
    assert report["units"] == len(wanted)
    assert report["scored"] == GROUP * sum(not group.stale for group in groups)
    assert report["samples_per_unit"] > report["one_call_per_sample"] > report["two_calls_per_sample"]


@pytest.mark.slow
async def test_three_clients_ask_for_the_same_samples_and_each_in_its_way(tmp_path: Path) -> None:
    world = build_world(tmp_path / "world", documents=200, train_requests=20, test_requests=5)
    groups = stretch_of(read_requests(world, "train"), 0.15, 0.2, seconds=2.0)
    formed = [query for group in groups for query in group.queries if query is not None]
    with SearchProcess("pubmed", ServerSettings(corpus=world, cache_folder=tmp_path)) as server:
        report = await compare_clients(groups, tmp_path / "run", server.base_url, top_k=50)
    assert {client["scored"] for client in report.values()} == {GROUP * sum(not group.stale for group in groups)}
    assert report["one_call_per_sample"]["units"] == GROUP * len(groups)
    assert report["two_calls_per_sample"]["units"] == 2 * len(formed)
    assert report["ours"]["units"] < len(formed)
    assert all(client["units"] <= QUOTA_PER_S * (client["seconds"] + 1.1) for client in report.values())
