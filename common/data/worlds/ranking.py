"""The ranking world: the literature of the demo with graded judgments, for engines that rank.

A study of the drug in the condition that is asked for has grade 2; one of the same drug in another condition has
grade 1. So the drug's names find something, and only with the condition do the best come first.
"""

from __future__ import annotations

from pathlib import Path

from common.data.worlds.folders import whole_folder, write_json_lines, write_lines
from common.data.worlds.publications import Literature, literature


def build_world(
    folder: str | Path, seed: int = 0, *, documents: int = 2000, train_requests: int = 320, test_requests: int = 80
) -> Path:
    """Write a BEIR folder with grades 1 and 2; the same seed gives the same bytes. Raises ValueError as
    `build_world`.
    """
    world = literature(seed, documents, train_requests + test_requests)
    with whole_folder(folder) as target:
        write_json_lines(
            target / "corpus.jsonl",
            ({"_id": _document_id(place), **document} for place, document in enumerate(world.documents)),
        )
        queries = ({"_id": _query_id(place), "text": text} for place, text in enumerate(world.requests))
        write_json_lines(target / "queries.jsonl", queries)
        judged = [list(_judgments(world, place)) for place in range(len(world.requests))]
        for split, requests in (("train", judged[:train_requests]), ("test", judged[train_requests:])):
            lines = (line for request in requests for line in request)
            write_lines(target / "qrels" / f"{split}.tsv", ("query-id\tcorpus-id\tscore", *lines))
    return Path(folder)


def _judgments(world: Literature, request: int) -> list[str]:
    asked = world.asked[request]
    grades = (
        (place, 2 if study == asked else 1) for place, study in enumerate(world.studies) if study.drug == asked.drug
    )
    return [f"{_query_id(request)}\t{_document_id(place)}\t{grade}" for place, grade in grades]


def _document_id(place: int) -> str:
    return f"d{place:05d}"


def _query_id(place: int) -> str:
    return f"q{place:04d}"
