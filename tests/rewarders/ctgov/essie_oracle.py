"""A brute-force ClinicalTrials.gov over lists of words: what the index must equal. It shares no code with the server.

A query is written as nested tuples and `text_of` turns it into text, so that the parser is on trial too:
    ("run", (piece, ...))                    words in a row; a piece may be hyphenated
    ("quoted", (word, ...))                  words in quotes
    ("range", field, low, high)              bounds as written
    ("day", field, text)                     a date, number or age without RANGE
    ("choice", value)                        AREA[Phase]value
    ("missing", area)   ("all",)
    ("not", query)   ("and", (query, ...), implicit)   ("or", (query, ...))
    ("in", area, query)   ("cover", coverage, query)   ("expand", expansion, query)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Query = tuple[Any, ...]

AREAS = {
    "BasicSearch": ("NCTId", "Acronym", "BriefTitle", "Condition", "InterventionName", "Keyword"),
    "ConditionSearch": ("Condition", "BriefTitle", "Keyword", "NCTId"),
    "TitleSearch": ("Acronym", "BriefTitle"),
    "InterventionSearch": ("InterventionName", "BriefTitle", "Keyword"),
    "BriefTitle": ("BriefTitle",),
    "Condition": ("Condition",),
    "Keyword": ("Keyword",),
    "Acronym": ("Acronym",),
}
MONTHS = {"year": 12.0, "month": 1.0}


@dataclass
class OracleTrial:
    """texts: field -> its values. first_posted: YYYY-MM-DD or YYYY-MM, or None. phases as in records."""

    id: str
    texts: dict[str, list[str]]
    first_posted: str | None
    enrollment: int | None
    minimum_age: str | None
    phases: list[str] = field(default_factory=list)

    def values(self, area: str) -> list[list[str]]:
        """Every value of every field of an area, as words."""
        texts = {**self.texts, "NCTId": [self.id]}
        return [_words(value) for name in AREAS[area] for value in texts.get(name, [])]

    def number(self, name: str) -> Any:
        """A comparable for the range fields: a day as text, a count, an age in months."""
        if name == "StudyFirstPostDate":
            return self.first_posted and (self.first_posted + "-01")[:10]
        if name == "EnrollmentCount":
            return self.enrollment
        return self.minimum_age and _months(self.minimum_age)


@dataclass(frozen=True)
class Context:
    area: str = "BasicSearch"
    coverage: str = "Contains"
    expansion: str = "Relaxation"


class Oracle:
    def __init__(self, trials: list[OracleTrial]) -> None:
        self.trials = trials

    def ids(self, query: Query, context: Context | None = None) -> set[str]:
        return {trial.id for trial in self.trials if self.holds(query, trial, context or Context())}

    def holds(self, query: Query, trial: OracleTrial, context: Context) -> bool:
        kind = query[0]
        if kind in _LEAVES:
            return _LEAVES[kind](query, trial, context)
        if kind == "not":
            return not self.holds(query[1], trial, context)
        if kind == "and":
            return all(self.holds(operand, trial, context) for operand in query[1])
        if kind == "or":
            return any(self.holds(operand, trial, context) for operand in query[1])
        changed = {"in": "area", "cover": "coverage", "expand": "expansion"}[kind]
        return self.holds(query[2], trial, Context(**{**vars(context), changed: query[1]}))


def _run(query: Query, trial: OracleTrial, context: Context) -> bool:
    if context.coverage != "Contains" or context.expansion not in ("Relaxation", "Lossy"):
        return _phrase_somewhere(_words(" ".join(query[1])), trial, context)
    found = [_phrase_somewhere(_words(piece), trial, context) for piece in query[1]]
    return all(found) if context.expansion == "Relaxation" else any(found)


def _quoted(query: Query, trial: OracleTrial, context: Context) -> bool:
    return _phrase_somewhere(_words(" ".join(query[1])), trial, context)


def _phrase_somewhere(words: list[str], trial: OracleTrial, context: Context) -> bool:
    return any(_covers(value, words, context.coverage) for value in trial.values(context.area))


def _covers(value: list[str], words: list[str], coverage: str) -> bool:
    places = [at for at in range(len(value) - len(words) + 1) if value[at : at + len(words)] == words]
    if coverage in ("FullMatch", "StartsWith"):
        places = [at for at in places if at == 0]
    if coverage in ("FullMatch", "EndsWith"):
        places = [at for at in places if at + len(words) == len(value)]
    return bool(places)


def _range(query: Query, trial: OracleTrial, _: Context) -> bool:
    _, name, low, high = query
    number = trial.number(name)
    return (
        number is not None
        and (low == "MIN" or number >= _bound(name, low, "-01"))
        and (high == "MAX" or number <= _bound(name, high, "-31"))
    )


def _bound(name: str, text: str, day: str) -> Any:
    if name == "EnrollmentCount":
        return int(text)
    if name == "MinimumAge":
        return _months(text)
    if "/" in text:
        month, day_of_month, year = text.split("/")
        return f"{year}-{month}-{day_of_month}"
    whole_year = "-01" if day == "-01" else "-12"
    return (text + whole_year * (len(text) == 4) + day)[:10]


def _day(query: Query, trial: OracleTrial, context: Context) -> bool:
    return _range(("range", query[1], query[2], query[2]), trial, context)


def _choice(query: Query, trial: OracleTrial, _: Context) -> bool:
    return query[1].replace(" ", "").upper() in trial.phases


def _missing(query: Query, trial: OracleTrial, _: Context) -> bool:
    if query[1] in AREAS:
        return not trial.values(query[1])
    return not trial.phases if query[1] == "Phase" else trial.number(query[1]) is None


_LEAVES: dict[str, Callable[[Query, OracleTrial, Context], bool]] = {
    "run": _run,
    "quoted": _quoted,
    "range": _range,
    "day": _day,
    "choice": _choice,
    "missing": _missing,
    "all": lambda *_: True,
}


def _words(text: str) -> list[str]:
    return text.lower().replace("-", " ").split()


def _months(age: str) -> float:
    number, unit = age.split()
    return float(number) * MONTHS[unit.lower().rstrip("s")]


# Precedence, from the loosest: a query is put in parentheses where it stands below a tighter one.
_OR, _AND, _UNARY = 0, 1, 2


def text_of(query: Query, place: int = _OR) -> str:
    """The query in Essie, with no more parentheses than its meaning needs."""
    kind = query[0]
    if kind == "run":
        return " ".join(query[1])
    if kind == "quoted":
        return f'"{" ".join(query[1])}"'
    if kind == "range":
        return f"AREA[{query[1]}]RANGE[{query[2]}, {query[3]}]"
    if kind == "day":
        return f"AREA[{query[1]}]{query[2]}"
    if kind == "choice":
        return f"AREA[Phase]{query[1]}"
    if kind == "missing":
        return f"AREA[{query[1]}]MISSING"
    if kind == "all":
        return "ALL"
    if kind == "not":
        return f"NOT {text_of(query[1], _UNARY)}"
    if kind in ("in", "cover", "expand"):
        operator = {"in": "AREA", "cover": "COVERAGE", "expand": "EXPANSION"}[kind]
        return f"{operator}[{query[1]}]{text_of(query[2], _UNARY)}"
    text = " OR ".join(text_of(operand, _AND) for operand in query[1]) if kind == "or" else _and_text(query)
    return f"({text})" if place > (_OR if kind == "or" else _AND) else text


def _and_text(query: Query) -> str:
    """Joined by AND, or where asked for by nothing, except before words, which would join the words on their left."""
    parts = [text_of(operand, _UNARY) for operand in query[1]]
    text = parts[0]
    for part, operand in zip(parts[1:], query[1][1:], strict=True):
        text += f" {part}" if query[2] and operand[0] != "run" else f" AND {part}"
    return text
