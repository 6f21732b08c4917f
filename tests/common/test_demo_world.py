"""The demo world: the obvious queries are bad in it, and a query that can be learned from requests is good."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.data.beir import read_corpus, read_split
from common.data.worlds import lexicon
from common.data.worlds.publications import build_world
from common.tasks import Row

RETMAX = 50
WORD = re.compile(r"[^\W_]+")


class NewestFirstSearch:
    """Boolean search over title and text, newest first, as the demo's search server does it."""

    def __init__(self, folder: Path) -> None:
        self.database = sqlite3.connect(":memory:")
        self.database.execute("CREATE VIRTUAL TABLE text USING fts5(id UNINDEXED, day UNINDEXED, body)")
        rows = ((d.id, d.metadata["pub_date"], f"{d.title} {d.text}") for d in read_corpus(folder))
        self.database.executemany("INSERT INTO text VALUES (?, ?, ?)", rows)
        self.database.execute("CREATE VIRTUAL TABLE words USING fts5vocab(text, row)")
        self.frequency = dict(self.database.execute("SELECT term, doc FROM words"))

    def recall(self, query: str, row: Row) -> float:
        found = self.database.execute(
            "SELECT id FROM text WHERE text MATCH ? ORDER BY day DESC, rowid LIMIT ?", (query, RETMAX)
        )
        return len({document for (document,) in found} & set(row.relevant)) / len(row.relevant)


@dataclass
class DemoWorld:
    search: NewestFirstSearch
    train: list[Row]
    held_out: list[Row]

    def mean_recall(self, query: Callable[[Row], str]) -> float:
        return sum(self.search.recall(query(row), row) for row in self.held_out) / len(self.held_out)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> DemoWorld:
    folder = build_world(tmp_path_factory.mktemp("demo") / "world", seed=0)
    return DemoWorld(NewestFirstSearch(folder), read_split(folder, "train"), read_split(folder, "test"))


def words(row: Row) -> list[str]:
    return list(dict.fromkeys(WORD.findall(row.text.lower())))


def quoted(terms: list[str], joiner: str) -> str:
    return joiner.join(f'"{term}"' for term in terms)


@pytest.mark.parametrize("joiner", [" ", " AND ", " OR "])
def test_neither_the_raw_request_nor_joining_its_words_is_good(world: DemoWorld, joiner: str) -> None:
    assert world.mean_recall(lambda row: quoted(words(row), joiner)) < 0.05


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_the_rarest_words_are_not_good(world: DemoWorld, count: int) -> None:
    def rarest(row: Row) -> str:
        known = [word for word in words(row) if word in world.search.frequency]
        return quoted(sorted(known, key=world.search.frequency.__getitem__)[:count], " AND ")

    assert world.mean_recall(rarest) < 0.2


def drug_names(row: Row) -> tuple[str, str]:
    """Generic and brand name of the drug that is asked for, read off the request alone."""
    joined = r"\b(\w+)(?: \(|, sold as |, that is | or )(\w+)"
    pairs = [pair for pair in re.findall(joined, row.text) if "placebo" not in pair]
    (names,) = {pair for pair in pairs if pair[0][0].isupper() != pair[1][0].isupper()}
    return names


def condition(row: Row) -> str:
    """The first word of the condition; the request names exactly one."""
    (name,) = {names[0] for names in lexicon.CONDITIONS if names[0] in row.text}
    return next(word for word in WORD.findall(name) if len(word) > 1)


def test_both_names_of_the_drug_and_a_word_of_the_condition_are_good(world: DemoWorld) -> None:
    def strategy(row: Row) -> str:
        return f"({quoted(list(drug_names(row)), ' OR ')}) AND {quoted([condition(row)], '')}"

    assert world.mean_recall(strategy) >= 0.7


def test_every_part_of_the_good_query_is_needed(world: DemoWorld) -> None:
    assert world.mean_recall(lambda row: quoted(list(drug_names(row)), " OR ")) < 0.45
    assert world.mean_recall(lambda row: quoted([condition(row)], "")) < 0.45
    assert world.mean_recall(lambda row: quoted([drug_names(row)[0], condition(row)], " AND ")) < 0.6


def test_splits_share_no_request_and_no_document(world: DemoWorld) -> None:
    assert (len(world.train), len(world.held_out)) == (800, 200)
    assert not {row.text for row in world.train} & {row.text for row in world.held_out}
    found = [{d for row in rows for d in row.relevant} for rows in (world.train, world.held_out)]
    assert not found[0] & found[1]


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    sizes = {"documents": 400, "train_requests": 60, "test_requests": 20}
    folders = [build_world(tmp_path / name, seed, **sizes) for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    files = ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/test.tsv")
    first, again, other = ([(folder / name).read_bytes() for name in files] for folder in folders)
    assert first == again
    assert first[0] != other[0]


def test_an_existing_folder_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    sizes = {"documents": 40, "train_requests": 6, "test_requests": 4}
    folder = build_world(tmp_path / "world", 0, **sizes)
    (folder / "stale").touch()
    build_world(folder, 1, **sizes)
    assert not (folder / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"documents": 100, "train_requests": 60, "test_requests": 20}, "ask for 320 or more"),
        ({"documents": 90_000, "train_requests": 9_000, "test_requests": 20}, "ask for fewer requests"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path: Path, sizes: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        build_world(tmp_path / "world", **sizes)
    assert not (tmp_path / "world").exists()
