"""Text to SQL: write the query that answers a question from a database.

Reward: execution accuracy, as in DeepRetrieval (Jiang et al. 2025, arXiv 2503.00223, with the values of its
published code) for BIRD and Spider. Whether two results are equal is decided by `common.sql.comparators`.
"""

from __future__ import annotations

from typing import Any, Final, Literal, get_args

from common.sql.comparators import ComparatorName, equal, prepare
from common.tasks.answer import ParsedAnswer
from common.tasks.base import Task
from common.tasks.outcome import EngineKind, Execution, Outcome
from common.tasks.reward import RewardTable
from common.tasks.row import Row

SqlData = Literal["bird", "spider"]

# Values of the metric `execution`.
EQUAL: Final = 1.0
RAN: Final = 0.5
FAILED: Final = 0.25
NOT_SQL: Final = 0.0

BIRD_REWARD: Final = RewardTable(
    metric="execution",
    tiers=((EQUAL, 1.0), (RAN, 0.3)),
    miss=0.0,
    bad_query=0.0,
    format_bonus=0.1,
    format_penalty=-2.0,
    json_penalty=-2.0,
    bonus_needs_gain=True,
)
BIRD_REWARD_WITHOUT_REASONING: Final = BIRD_REWARD.but({"tiers": (*BIRD_REWARD.tiers, (FAILED, 0.1))})
SPIDER_REWARD: Final = BIRD_REWARD.but({"tiers": ((EQUAL, 1.0),)})

_ROLE: Final = """\
You write SQL for SQLite. You get the schema of a database, at times some knowledge about its contents, and a \
question. Write the one SELECT statement that answers the question, on a single line, with the columns that are \
asked for and no others, in the order in which they are asked for."""


class TextToSql(Task):
    """SQL scored by execution: its result against that of the reference query."""

    name = "text_to_sql"
    metric = "accuracy"
    measures = frozenset({"execution", "executed", "timeout", "rows"})
    answer_key = "sql"
    role = _ROLE
    request_line = "Answer the question from this database:"
    think_about = "which tables, columns and conditions the question needs"
    example = "your SQL query"
    needs = ("gold_sql", "database")
    engines: frozenset[EngineKind] = frozenset({"sqlite"})

    def __init__(
        self,
        *,
        dataset: SqlData = "bird",
        comparator: ComparatorName | None = None,
        reasoning: bool = True,
        **options: Any,
    ) -> None:
        """dataset: whose reward table; BIRD's without reasoning pays a little for SQL that fails while it runs.
        comparator: which results count as equal, None: `bird`, the rule of the original for both sets. Other options
        as `Task`.
        """
        if dataset not in get_args(SqlData):
            raise ValueError(f"dataset must be one of {', '.join(get_args(SqlData))}, got {dataset!r}")
        if comparator is not None and comparator not in get_args(ComparatorName):
            raise ValueError(f"comparator must be one of {', '.join(get_args(ComparatorName))}, got {comparator!r}")
        bird = BIRD_REWARD if reasoning else BIRD_REWARD_WITHOUT_REASONING
        self.default_reward = bird if dataset == "bird" else SPIDER_REWARD
        self.comparator: ComparatorName = comparator or "bird"
        super().__init__(reasoning=reasoning, **options)

    def request(self, row: Row) -> str:
        """Schema, knowledge and question; a short prompt needs them as well."""
        parts = [f"Database Schema:\n{row.tables.strip()}"]
        if row.knowledge.strip():
            parts.append(f"External Knowledge:\n{row.knowledge.strip()}")
        return "\n\n".join([*parts, f"Question:\n{row.text.strip()}"])

    def executable(self, sql: str) -> str:
        """The text to execute under this task's comparator, for prediction and reference query alike."""
        return prepare(self.comparator, sql)

    def measure(self, row: Row, answer: ParsedAnswer, outcome: Outcome) -> dict[str, float]:
        """`accuracy` (1 or 0), `execution` (1 equal, 0.5 ran, 0.25 failed, 0 not SQL or stopped), `executed`,
        `timeout`, `rows`.
        """
        if not isinstance(outcome, Execution):
            raise ValueError("the task text_to_sql scores executed queries: it needs the engine sqlite")
        execution = self._execution(row, outcome)
        return {
            "accuracy": float(execution == EQUAL),
            "execution": execution,
            "executed": float(outcome.status == "ok"),
            "timeout": float(outcome.status == "timeout"),
            "rows": float(len(outcome.table.rows)) if outcome.table else 0.0,
        }

    def _execution(self, row: Row, outcome: Execution) -> float:
        if outcome.status == "ok" and outcome.table is not None and outcome.gold is not None:
            return EQUAL if equal(self.comparator, outcome.gold, outcome.table, row.gold_sql) else RAN
        if outcome.status == "timeout" or "syntax" in outcome.detail:  # as the original tells them apart
            return NOT_SQL
        return FAILED


TASK = TextToSql
