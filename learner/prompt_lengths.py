"""Prompts that the engine cannot take: found before the first ticket, counted, and set aside by a rule of their own.

The original ends at the first prompt that is too long. Here such a request keeps its place in the stream, so that every
position means the same prompt whatever the limits are, and is set aside there (`PROMPT_TOO_LONG`).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from common.data.beir import DataError
from common.tasks import Row, Task
from learner.ledger import TicketLedger

logger = logging.getLogger(__name__)

PROMPT_TOO_LONG: Final = "prompt_too_long"
_AT_ONCE: Final = 1024

CountTokens = Callable[[Sequence[Row]], list[int]]
"""Tokens of each row's prompt."""


def prompt_tokens(model_dir: str | Path, task: Task) -> CountTokens:
    """Counts what an actor sends to its engine: the task's messages through the model's own chat template, and the
    beginning of the answer where the task gives one.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)

    def count(rows: Sequence[Row]) -> list[int]:
        chats = [task.messages(row) for row in rows]
        texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        encoded = tokenizer([text + task.response_prefix for text in texts], add_special_tokens=False)
        return list(map(len, encoded["input_ids"]))

    return count


def too_long(rows: Sequence[Row], count: CountTokens, most: int) -> frozenset[str]:
    """Ids of the rows whose prompt has more than `most` tokens.

    Raises:
        DataError: all of them.
    """
    found: set[str] = set()
    for block in _blocks(rows):
        lengths = zip(block, count(block), strict=True)
        found.update(row.id for row, length in lengths if length > most)
    if rows and len(found) == len(rows):
        raise DataError(
            f"every prompt has more than {most} tokens: raise actor.max_model_len, {len(rows)} requests wait"
        )
    return frozenset(found)


def log_too_long(found: frozenset[str], rows: Sequence[Row], most: int, split: str) -> None:
    """One line, where there is anything to say."""
    if found:
        first = next(row.id for row in rows if row.id in found)
        logger.warning(
            "%d of %d requests of %s have prompts of more than %d tokens (%s for one) and are left out: "
            "raise actor.max_model_len, or lower sampling.max_tokens",
            *(len(found), len(rows), split, most, first),
        )


def issue_fitting(
    ledger: TicketLedger, fits: Callable[[int], bool], count: int, published: int
) -> tuple[list[int], list[int]]:
    """Issue `count` tickets whose prompts fit; the positions on the way that do not are set aside in the ledger.

    At least one position of every epoch must fit, or this never ends. Returns (issued, set aside).
    """
    issued: list[int] = []
    aside: list[int] = []
    while len(issued) < count:
        for position in ledger.issue(count - len(issued), published):
            if fits(position):
                issued.append(position)
            else:
                ledger.set_aside(position, PROMPT_TOO_LONG)
                aside.append(position)
    return issued, aside


def _blocks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    remaining = iter(rows)
    while block := list(itertools.islice(remaining, _AT_ONCE)):
        yield block
