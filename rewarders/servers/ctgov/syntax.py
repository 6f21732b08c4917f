"""The syntax tree of a query in Essie, the language of ClinicalTrials.gov. It knows no search engine.

Context operators (AREA, COVERAGE, EXPANSION) are gone from the tree: every leaf says itself where and how it searches.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from rewarders.servers.ctgov.areas import Area, Field


class Coverage(Enum):
    """How much of a value a term has to match."""

    CONTAINS = "Contains"
    FULL_MATCH = "FullMatch"
    STARTS_WITH = "StartsWith"
    ENDS_WITH = "EndsWith"


class Expansion(Enum):
    """How far a term may be expanded; see `essie` for what of it is real here."""

    NONE = "None"
    TERM = "Term"
    CONCEPT = "Concept"
    RELAXATION = "Relaxation"
    LOSSY = "Lossy"


@dataclass(frozen=True, slots=True)
class Term:
    """Phrases to be found in values of the area's fields: all of them, each in any field, or one of them at least if
    `any_phrase`. Without phrases (text without letters and digits) nothing is found."""

    phrases: tuple[tuple[str, ...], ...]
    area: Area
    coverage: Coverage = Coverage.CONTAINS
    any_phrase: bool = False


@dataclass(frozen=True, slots=True)
class Range:
    """Records with a value of the field between `low` and `high`, both included, as `values` counts."""

    field: Field
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Missing:
    """Records without a value in any field of the area."""

    area: Area


@dataclass(frozen=True, slots=True)
class Everything:
    """All records."""


@dataclass(frozen=True, slots=True)
class Not:
    """Records that the operand does not find."""

    operand: Node


@dataclass(frozen=True, slots=True)
class And:
    operands: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Or:
    operands: tuple[Node, ...]


Node: TypeAlias = Term | Range | Missing | Everything | Not | And | Or


def positive_terms(node: Node) -> list[Term]:
    """The terms that a record is found by: all but those below a NOT."""
    match node:
        case Term():
            return [node]
        case And() | Or():
            return [term for operand in node.operands for term in positive_terms(operand)]
        case _:
            return []
