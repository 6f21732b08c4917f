"""Splits that share nothing: what is in a later stage's split is taken out of the earlier one's, and counted.

The original validated on test rows (PubMed, trials, SQuAD) and on dev and test together (BEIR); its trial set has
requests in both train and test. Here validation is the set's own `dev`, or is cut from train.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

import msgspec

from common.tasks.row import Row

# A row that several splits hold stays in the first of these.
KEPT_IN: Final = ("test", "dev", "train")
CUT_SHARE: Final = 10
CUT_MOST: Final = 500


def same_request(row: Row) -> tuple[str, str]:
    """Rows with equal keys ask the same: case and white space do not count, the database does."""
    return " ".join(row.text.casefold().split()), row.database


def merge_requests(rows: Sequence[Row]) -> list[Row]:
    """One row per request, where the first stood, with the relevant documents of all of them, best grade first."""
    merged: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = same_request(row)
        merged[key] = _joined(merged[key], row) if key in merged else row
    return list(merged.values())


def without_shared(splits: dict[str, list[Row]]) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """The splits without the rows another one keeps (`KEPT_IN`), and how many were taken out, by "split/keeper"."""
    left = dict(splits)
    taken: dict[str, int] = {}
    order = [name for name in KEPT_IN if name in splits] + sorted(set(splits) - set(KEPT_IN))
    for place, keeper in enumerate(order):
        kept = {same_request(row) for row in left[keeper]}
        for split in order[place + 1 :]:
            own = [row for row in left[split] if same_request(row) not in kept]
            if len(own) < len(left[split]):
                taken[f"{split}/{keeper}"] = len(left[split]) - len(own)
            left[split] = own
    return left, taken


def cut(rows: Sequence[Row], seed: int, size: int | None = None) -> tuple[list[Row], list[Row]]:
    """(what stays, what is cut off), both in their old order; the same seed cuts the same.

    size: rows to cut off, None for a tenth of them, one at least and 500 at most. Questions about databases go by whole
    databases, so that none is in both parts: then a few rows more.
    """
    if size is None:
        size = max(1, min(CUT_MOST, len(rows) // CUT_SHARE))
    groups: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row.database or str(place), []).append(place)
    names = list(groups)
    random.Random(seed).shuffle(names)
    chosen: set[int] = set()
    for name in names[:-1]:  # something always stays
        if len(chosen) >= size:
            break
        chosen.update(groups[name])
    return (
        [row for place, row in enumerate(rows) if place not in chosen],
        [row for place, row in enumerate(rows) if place in chosen],
    )


def with_distinct_ids(splits: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The same rows; an id that occurs again gets the split's name, and a number if it must, behind it."""
    seen: set[str] = set()
    distinct: dict[str, list[Row]] = {}
    for split, rows in splits.items():
        distinct[split] = []
        for row in rows:
            name, number = row.id, 1
            while name in seen:
                name = f"{row.id}-{split}" if number == 1 else f"{row.id}-{split}-{number}"
                number += 1
            seen.add(name)
            distinct[split].append(row if name == row.id else msgspec.structs.replace(row, id=name))
    return distinct


def _joined(first: Row, second: Row) -> Row:
    judgments = dict(first.judgments)
    for document, grade in second.judgments.items():
        judgments[document] = max(grade, judgments.get(document, 0.0))
    relevant = tuple(sorted(judgments, key=lambda document: -judgments[document]))
    grades = tuple(judgments[document] for document in relevant)
    return msgspec.structs.replace(
        first,
        relevant=relevant,
        grades=() if set(grades) <= {1.0} else grades,
    )
