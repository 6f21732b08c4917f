"""The SQL world: small databases, and questions whose query is short but takes table, columns and value from the text.

Every database has two tables, whose columns have the same names in part, so that a query of the right shape with a
wrong table or column runs, and returns something else. The held-out questions are about databases of their own.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from common.data.worlds.folders import whole_folder, write_rows
from common.tasks.row import Row

# ruff: noqa: SIM905 - word lists are read and edited as text

TABLES = """dog horse boat train house shop school farm bridge garden lamp engine tower hotel camera guitar bicycle
    library factory market""".split()
WORDS = {
    "color": "red green blue white black brown grey yellow purple orange".split(),
    "city": "oslo lima turin basel cork quito osaka hanoi perth tartu".split(),
    "owner": "anna boris clara david elena felix greta henry irene jonas".split(),
    "material": "wood steel glass stone paper brick copper rubber silver cotton".split(),
    "season": "spring summer autumn winter january april july october easter harvest".split(),
    "shape": "round square oval flat long curved pointed hollow narrow broad".split(),
}
NUMBERS = ("age", "size", "price", "weight", "height", "speed", "rank", "score")

_ROWS_PER_TABLE = 24
_LARGEST = 900


@dataclass(frozen=True, slots=True)
class Table:
    """words, numbers: names of its columns with words and with numbers. rows: values in that order."""

    name: str
    words: tuple[str, ...]
    numbers: tuple[str, ...]
    rows: tuple[tuple[str | int, ...], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return self.words + self.numbers

    @property
    def statement(self) -> str:
        """As it stands in the prompt, and as the database is made."""
        return f"CREATE TABLE {self.name} ({', '.join(self.columns)})"


def build_world(
    folder: str | Path, seed: int = 0, *, databases: int = 40, heldout_databases: int = 10, questions: int = 20
) -> Path:
    """Write databases/*.sqlite and rows/{train,test}.jsonl; the same seed gives the same questions and tables.

    databases, heldout_databases: with questions of the split train, and test. questions: per database.
    """
    rng = random.Random(seed)
    with whole_folder(folder) as target:
        (target / "databases").mkdir()
        for split, number in (("train", databases), ("test", heldout_databases)):
            rows: list[Row] = []
            for place in range(number):
                name = f"{split}{place:02d}"
                tables = [_table(rng, table) for table in rng.sample(TABLES, 2)]
                _write_database(target / "databases" / f"{name}.sqlite", tables)
                schema = "\n".join(table.statement for table in tables)
                for text, sql in _questions(rng, tables, questions):
                    rows.append(Row(f"{name}-{len(rows)}", text, database=name, tables=schema, gold_sql=sql))
            write_rows(target, split, rows)
    return Path(folder)


def _table(rng: random.Random, name: str) -> Table:
    words, numbers = tuple(rng.sample(sorted(WORDS), 2)), tuple(rng.sample(NUMBERS, 2))
    return Table(name, words, numbers, tuple(_entry(rng, words, numbers) for _ in range(_ROWS_PER_TABLE)))


def _entry(rng: random.Random, words: tuple[str, ...], numbers: tuple[str, ...]) -> tuple[str | int, ...]:
    return (*(rng.choice(WORDS[column]) for column in words), *(rng.randint(1, _LARGEST) for _ in numbers))


def _write_database(path: Path, tables: list[Table]) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for table in tables:
            connection.execute(table.statement)
            places = ", ".join("?" * len(table.columns))
            connection.executemany(f"INSERT INTO {table.name} VALUES ({places})", table.rows)
        connection.commit()


def _questions(rng: random.Random, tables: list[Table], number: int) -> Iterator[tuple[str, str]]:
    """Distinct questions, each with its query."""
    seen: set[str] = set()
    while len(seen) < number:
        text, sql = rng.choice((_count, _look_up, _highest, _lowest))(rng, rng.choice(tables))
        if text not in seen:
            seen.add(text)
            yield text, sql


def _count(rng: random.Random, table: Table) -> tuple[str, str]:
    column, value = _condition(rng, table)
    text = rng.choice(
        (
            f"How many {table.name} entries have the {column} {value}?",
            f"Count each {table.name} with {column} {value}.",
        )
    )
    return text, f"SELECT count(*) FROM {table.name} WHERE {column} = '{value}'"


def _look_up(rng: random.Random, table: Table) -> tuple[str, str]:
    column, value = _condition(rng, table)
    wanted = rng.choice([other for other in table.columns if other != column])
    text = rng.choice(
        (
            f"Which {wanted} does every {table.name} with {column} {value} have?",
            f"List the {wanted} of each {table.name} whose {column} is {value}.",
        )
    )
    return text, f"SELECT {wanted} FROM {table.name} WHERE {column} = '{value}'"


def _highest(rng: random.Random, table: Table) -> tuple[str, str]:
    column = rng.choice(table.numbers)
    text = rng.choice(
        (f"What is the highest {column} of any {table.name}?", f"Give the largest {column} among each {table.name}.")
    )
    return text, f"SELECT max({column}) FROM {table.name}"


def _lowest(rng: random.Random, table: Table) -> tuple[str, str]:
    column = rng.choice(table.numbers)
    text = rng.choice(
        (f"What is the lowest {column} of any {table.name}?", f"Give the smallest {column} among each {table.name}.")
    )
    return text, f"SELECT min({column}) FROM {table.name}"


def _condition(rng: random.Random, table: Table) -> tuple[str, str]:
    """A column and a value that stands in it."""
    place = rng.randrange(len(table.words))
    return table.words[place], str(rng.choice(table.rows)[place])
