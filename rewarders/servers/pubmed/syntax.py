"""The syntax tree of a PubMed query. It knows no search engine: any backend can walk it.

Operators have no precedence in PubMed, so a level of a query is one flat `Group`, read from left to right,
and the tree is only as deep as the query's parentheses.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from rewarders.servers.dates import written_date
from rewarders.servers.pubmed.fields import ALL_FIELDS, Field


class Operator(Enum):
    """A Boolean operator. NOT is binary: everything on its left without what is on its right."""

    AND = "AND"
    OR = "OR"
    NOT = "NOT"


@dataclass(frozen=True, slots=True)
class Term:
    """Adjacent words in one field.

    `prefix` truncates the last word. `splits`: if the phrase occurs nowhere in the corpus, each of its words
    is searched instead, all of them required. `droppable`: if the term occurs nowhere in the corpus, PubMed
    reports it and searches the rest of the query as if the term were not there. `quoted` only changes what is
    reported.
    """

    words: tuple[str, ...]
    field: Field
    text: str
    prefix: bool = False
    splits: bool = False
    droppable: bool = False
    quoted: bool = False


@dataclass(frozen=True, slots=True)
class DateRange:
    """Documents published from `first` to `last`, both included, as YYYYMMDD."""

    first: int
    last: int
    field: Field


@dataclass(frozen=True, slots=True)
class DocumentId:
    """The one document with this id."""

    id: str


@dataclass(frozen=True, slots=True)
class Unindexed:
    """A term of a field for which the corpus has no data. Matches nothing."""

    text: str
    field: Field


@dataclass(frozen=True, slots=True)
class Everything:
    """All documents."""


@dataclass(frozen=True, slots=True)
class Ignored:
    """An operand of nothing but stopwords: PubMed searches the rest of the query as if it were not there."""

    text: str


@dataclass(frozen=True, slots=True)
class Group:
    """`first`, then each (operator, operand) applied to the result so far, from left to right."""

    first: Node
    rest: tuple[tuple[Operator, Node], ...]


Node: TypeAlias = Term | DateRange | DocumentId | Unindexed | Everything | Ignored | Group


def translation(node: Node) -> str:
    """The tree in PubMed's own long form, as esearch reports it in `querytranslation`."""
    match node:
        case Term():
            # PubMed prints tagged and quoted terms as written, and other words in lower case.
            as_written = node.quoted or node.field != ALL_FIELDS
            words = " ".join(node.text.rstrip("*.'- ").split()) if as_written else " ".join(node.words)
            return f'"{words}{"*" if node.prefix else ""}"[{node.field.label}]'
        case DateRange():
            return f"{written_date(node.first)}:{written_date(node.last)}[{node.field.label}]"
        case DocumentId():
            return f"{node.id}[UID]"
        case Unindexed():
            return f'"{node.text}"[{node.field.label}]'
        case Everything():
            return "all[Filter]"
        case Ignored():
            return node.text
        case Group():
            parts = [_operand(node.first)]
            for operator, operand in node.rest:
                parts += [operator.value, _operand(operand)]
            return " ".join(parts)


def _operand(node: Node) -> str:
    text = translation(node)
    return f"({text})" if isinstance(node, Group) else text
