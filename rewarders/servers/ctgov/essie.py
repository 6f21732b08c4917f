"""A parser of Essie queries (ClinicalTrials.gov, "Constructing Complex Search Queries"; subset).

Precedence, highest first: terms, RANGE, MISSING, ALL and parentheses; NOT and the context operators, which are unary
and act on what follows them; AND; OR. Operands without an operator between them are joined by AND. Operators count in
upper case only. What the service refuses is refused here, in its words where they are known.

A run of words is one term. EXPANSION is approximated: there are no synonyms and no variants of words, and case and
accents never count. So None, Term and Concept all mean the words as a phrase; Relaxation, the default, means all words
anywhere in the area; Lossy means any of them. Quoted words are a phrase under each of them, and so is every term under
a COVERAGE other than Contains. A hyphenated word is a phrase. TILT is accepted and changes nothing. SEARCH[Location]
and DISTANCE are refused, which the service would not do. There is no truncation in Essie; a `*` separates words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn

from rewarders.servers.ctgov.areas import BASIC_SEARCH, Area, Field, Kind, area_of
from rewarders.servers.ctgov.lexemes import EssieError, Lexeme, lexemes_of
from rewarders.servers.ctgov.syntax import And, Coverage, Everything, Expansion, Missing, Node, Not, Or, Range, Term
from rewarders.servers.ctgov.values import bound_of, span_of
from rewarders.servers.text import search_words

MAX_QUERY_CHARACTERS = 20_000
MAX_DEPTH = 50
# Longer runs of words are refused by the service (12 pass, 14 do not, measured with query.cond).
MAX_TERM_WORDS = 13

_CONTEXT = ("AREA", "SEARCH", "COVERAGE", "EXPANSION", "TILT")
_STARTS_OPERAND = frozenset({"(", "NOT", "ALL", "MISSING", "RANGE", "DISTANCE", "word", "quoted", *_CONTEXT})
_TOO_COMPLICATED = "Too complicated query"


def parse(text: str, area: Area = BASIC_SEARCH) -> Node | None:
    """Parse a query whose terms are searched in `area` unless it says otherwise. None for a query of blanks.

    Raises:
        EssieError: the service would refuse the query, or it asks for what this server does not have.
    """
    if len(text) > MAX_QUERY_CHARACTERS:
        raise EssieError(_TOO_COMPLICATED)
    parser = _Parser(list(lexemes_of(text)))
    return parser.query(_Context(area))


@dataclass(frozen=True, slots=True)
class _Context:
    """What the context operators before an operand have set."""

    area: Area
    coverage: Coverage = Coverage.CONTAINS
    expansion: Expansion = Expansion.RELAXATION


class _Parser:
    """Recursive descent; only parentheses recurse, and their depth is bounded."""

    def __init__(self, lexemes: list[Lexeme]) -> None:
        self._lexemes = lexemes
        self._at = 0
        self._depth = 0

    @property
    def _next(self) -> Lexeme:
        return self._lexemes[self._at]

    def _take(self) -> Lexeme:
        lexeme = self._lexemes[self._at]
        self._at += 1
        return lexeme

    def query(self, context: _Context) -> Node | None:
        if self._next.kind == "end":
            return None
        node = self._or(context)
        if self._next.kind != "end":
            raise EssieError(f"extraneous input '{self._next.text}' expecting <EOF>")
        return node

    def _or(self, context: _Context) -> Node:
        operands = [self._and(context)]
        while self._next.kind == "OR":
            self._take()
            operands.append(self._and(context))
        return operands[0] if len(operands) == 1 else Or(tuple(operands))

    def _and(self, context: _Context) -> Node:
        operands = [self._unary(context)]
        while True:
            if self._next.kind == "AND":
                # One or many: `a AND AND b` is legal.
                while self._next.kind == "AND":
                    self._take()
            elif self._next.kind not in _STARTS_OPERAND:
                break
            operands.append(self._unary(context))
        return operands[0] if len(operands) == 1 else And(tuple(operands))

    def _unary(self, context: _Context) -> Node:
        negated = False
        while self._next.kind == "NOT" or self._next.kind in _CONTEXT:
            lexeme = self._take()
            if lexeme.kind == "NOT":
                negated = not negated
            else:
                context = _CONTEXT_READERS[lexeme.kind](context, lexeme.text)
        node = self._source(context)
        return Not(node) if negated else node

    def _source(self, context: _Context) -> Node:
        lexeme = self._next
        if lexeme.kind == "(":
            return self._parentheses(context)
        if lexeme.kind == "word":
            return self._run(context)
        if lexeme.kind not in _STARTS_OPERAND:
            self._no_operand()
        self._take()
        match lexeme.kind:
            case "quoted":
                return _term([lexeme.text], context, quoted=True)
            case "RANGE":
                return _range(lexeme.text, context.area)
            case "MISSING":
                return Missing(context.area)
            case "ALL":
                return Everything()
            case _:
                raise EssieError(f"{lexeme.kind} is not supported by this server")

    def _parentheses(self, context: _Context) -> Node:
        self._take()
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise EssieError(_TOO_COMPLICATED)
        node = self._or(context)
        if self._next.kind != ")":
            raise EssieError(f"missing ')' at '{self._next.text}'")
        self._take()
        self._depth -= 1
        return node

    def _run(self, context: _Context) -> Node:
        words = []
        while self._next.kind == "word":
            words.append(self._take().text)
        return _term(words, context, quoted=False)

    def _no_operand(self) -> NoReturn:
        """An operator or a parenthesis where an operand should be."""
        if self._next.kind == "end":
            raise EssieError("inner bool query clause cannot be null")
        raise EssieError(f"mismatched input '{self._next.text}' expecting {{'(', 'NOT', Term}}")


# Context operators.


def _with_area(context: _Context, name: str) -> _Context:
    area = area_of(name)
    if area is None:
        raise EssieError(f"Unknown area name: `{name}`")
    return replace(context, area=area)


def _with_coverage(context: _Context, name: str) -> _Context:
    try:
        return replace(context, coverage=Coverage(name))
    except ValueError:
        raise EssieError(f"Invalid coverage: {name}") from None


def _with_expansion(context: _Context, name: str) -> _Context:
    try:
        return replace(context, expansion=Expansion(name))
    except ValueError:
        raise EssieError(f"Invalid expansion: {name}") from None


def _with_search(context: _Context, name: str) -> _Context:
    if name != "Study":
        raise EssieError(f"SEARCH[{name}] is not supported by this server")
    return context


def _with_tilt(context: _Context, name: str) -> _Context:
    _with_area(context, name)
    return context


_CONTEXT_READERS: dict[str, Callable[[_Context, str], _Context]] = {
    "AREA": _with_area,
    "COVERAGE": _with_coverage,
    "EXPANSION": _with_expansion,
    "SEARCH": _with_search,
    "TILT": _with_tilt,
}


# Leaves.


def _range(inside: str, area: Area) -> Range:
    if len(area.fields) != 1:
        raise EssieError(f"RANGE is not supported for multiple ({len(area.fields)}) fields")
    field = area.fields[0]
    bounds = inside.split(",")
    if field.is_text or len(bounds) != 2:
        raise EssieError(f"RANGE is not supported for field `{field.path}` and [{inside}]")
    low, high = (bound_of(text, field.kind, upper=upper) for text, upper in zip(bounds, (False, True), strict=True))
    if low is None or high is None:
        raise EssieError(f"Invalid bound of RANGE for field `{field.path}`: [{inside}]")
    return Range(field, low, high)


def _term(pieces: list[str], context: _Context, *, quoted: bool) -> Node:
    """The leaf for one quoted text, or for the words of a run."""
    if len(context.area.fields) == 1:
        field = context.area.fields[0]
        if not field.is_text:
            return _value(" ".join(pieces), field)
        if field.kind is Kind.ENUM:
            return _choice(" ".join(pieces), context)
    phrases = [tuple(words) for piece in pieces if (words := search_words(piece))]
    if not quoted and sum(map(len, phrases)) > MAX_TERM_WORDS:
        raise EssieError(_TOO_COMPLICATED)
    loose = context.expansion in (Expansion.RELAXATION, Expansion.LOSSY) and context.coverage is Coverage.CONTAINS
    if not loose and phrases:
        phrases = [tuple(word for phrase in phrases for word in phrase)]
    any_phrase = loose and context.expansion is Expansion.LOSSY
    return Term(tuple(phrases), context.area, context.coverage, any_phrase)


def _value(text: str, field: Field) -> Range:
    """`AREA[StartDate]2022`: a day of that year."""
    span = span_of(text, field.kind)
    if span is None:
        raise EssieError(f"Invalid value for field `{field.path}`: `{text}`")
    return Range(field, *span)


def _choice(text: str, context: _Context) -> Term:
    """One value of an enum, written in any case and with any separators: `Phase 3`, `PHASE3`."""
    (field,) = context.area.fields
    written = "".join(search_words(text))
    words = tuple(search_words(text))
    if field.values:
        named = {"".join(search_words(value)): value for value in field.values}
        if written not in named:
            allowed = ", ".join(f"`{value}`" for value in field.values)
            raise EssieError(f"Allowed values for enum field `{field.path}` are {allowed}")
        words = tuple(search_words(named[written]))
    return Term((words,) if words else (), context.area, Coverage.FULL_MATCH)
