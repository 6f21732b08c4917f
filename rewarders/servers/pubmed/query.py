"""A tolerant parser of the PubMed query language (PubMed User Guide, "Advanced search"; subset).

Operators AND, OR and NOT count in upper case only and are evaluated strictly from left to right; in lower
case they are stopwords, as in PubMed. A run of untagged words between operators is one operand (all of its
words, in any order); other neighbors without an operator are joined by AND. A tag after several words asks
for them as a phrase; hyphenated words are a phrase that does not fall apart.

Language models write malformed queries. What PubMed would not refuse is repaired, and each repair is
recorded: the last of several operators counts (`AND NOT` is NOT), dangling operators, unpaired quotes and
brackets, and tags without a term are dropped, `NOT x` at the start of a level means all documents but x.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from rewarders.servers.dates import date_range
from rewarders.servers.pubmed.fields import ALL_FIELDS, FILTER_FIELD, Field, FieldKind, field_of
from rewarders.servers.pubmed.syntax import (
    DateRange,
    DocumentId,
    Everything,
    Group,
    Ignored,
    Node,
    Operator,
    Term,
    Unindexed,
)
from rewarders.servers.text import STOPWORDS, search_words

MAX_QUERY_CHARACTERS = 20_000
MAX_DEPTH = 64
MIN_TRUNCATED_CHARACTERS = 4

_LEXEMES = re.compile(
    r"""
    "(?P<quoted>[^"]*)"
    | \[(?P<tag>[^\[\]]*)\]
    | (?P<open>\() | (?P<close>\))
    | (?P<word>[^\s()\[\]"]+)
    | (?P<stray>["\[\]])
    """,
    re.VERBOSE,
)
_PLAIN_PUNCTUATION = str.maketrans(
    {
        **dict.fromkeys("“”„‟«»″＂", '"'),
        **dict.fromkeys("‐‑‒–—−", "-"),
        **dict.fromkeys("‘’", "'"),
        # Neither XML nor UTF-8 could carry these back in an answer.
        **{chr(code): " " for code in (*range(0x20), 0xFFFE, 0xFFFF, *range(0xD800, 0xE000))},
    }
)
# Characters that keep the parts of one word together. All others separate words.
_PIECES = re.compile(r"[\w\-'.*]+")


class QuerySyntaxError(ValueError):
    """A query that PubMed answers with an error. The message is one line."""


@dataclass(frozen=True, slots=True)
class ParsedQuery:
    """A query as understood. `root` is None if it holds no search word at all.

    `ignored` are dropped stopwords, `unknown_tags` tags that PubMed does not know, with their brackets;
    `repairs` says in words what had to be mended.
    """

    root: Node | None
    ignored: tuple[str, ...] = ()
    unknown_tags: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()


def parse(text: str) -> ParsedQuery:
    """Parse a PubMed query.

    Raises:
        QuerySyntaxError: parentheses are unbalanced or nested deeper than MAX_DEPTH, or the query is longer
            than MAX_QUERY_CHARACTERS.
    """
    if len(text) > MAX_QUERY_CHARACTERS:
        raise QuerySyntaxError(f"the query is longer than {MAX_QUERY_CHARACTERS} characters")
    parser = _Parser()
    for kind, value in _lex(text.translate(_PLAIN_PUNCTUATION)):
        parser.take(kind, value)
    return parser.finish()


def _lex(text: str) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) of each lexeme; kinds are the group names of the pattern and `operator`."""
    for match in _LEXEMES.finditer(text):
        kind = str(match.lastgroup)
        value = match[kind]
        if kind == "word" and value in Operator.__members__:
            kind = "operator"
        yield kind, value


@dataclass(slots=True)
class _Level:
    """What has been read of one pair of parentheses."""

    operands: list[tuple[Operator, Node]] = field(default_factory=list)
    operator: Operator | None = None
    words: list[str] = field(default_factory=list)
    quoted: str | None = None
    opens_range: bool = False

    def add(self, node: Node) -> None:
        """Append an operand, joined by the operator read before it or else by AND."""
        operator, self.operator = self.operator, None
        if self.opens_range and isinstance(node, DateRange):
            self._close_range(node)
        elif not self.operands and operator is Operator.NOT:
            self.operands = [(Operator.AND, Everything()), (Operator.NOT, node)]
        else:
            self.operands.append((operator or Operator.AND, node))
        self.opens_range = False

    def _close_range(self, last: DateRange) -> None:
        operator, first = self.operands.pop()
        assert isinstance(first, DateRange)
        self.operands.append((operator, DateRange(first.first, last.last, first.field)))

    def node(self) -> Node | None:
        if not self.operands:
            return None
        first = self.operands[0][1]
        return Group(first, tuple(self.operands[1:])) if len(self.operands) > 1 else first


class _Parser:
    """Reads lexemes with an explicit stack of levels, so that no query can exhaust Python's own."""

    def __init__(self) -> None:
        self._levels = [_Level()]
        self._ignored: list[str] = []
        self._unknown_tags: list[str] = []
        self._repairs: list[str] = []

    def take(self, kind: str, value: str) -> None:
        getattr(self, f"_take_{kind}")(value)

    def finish(self) -> ParsedQuery:
        if len(self._levels) > 1:
            raise QuerySyntaxError("unbalanced parentheses: an opening one is never closed")
        root = self._end_level(self._levels[0])
        return ParsedQuery(root, tuple(self._ignored), tuple(self._unknown_tags), tuple(self._repairs))

    # One method per kind of lexeme.

    def _take_word(self, word: str) -> None:
        level = self._levels[-1]
        self._flush_quoted(level)
        starts_range = word.startswith(":") and not level.words and level.operator is None
        if starts_range and level.operands and isinstance(level.operands[-1][1], DateRange):
            level.opens_range = True
            word = word[1:]
        if word:
            level.words.append(word)

    def _take_quoted(self, text: str) -> None:
        level = self._levels[-1]
        self._flush(level)
        level.quoted = text

    def _take_tag(self, tag: str) -> None:
        level = self._levels[-1]
        if level.quoted is None and not level.words:
            self._repairs.append(f"tag without a term dropped: [{tag}]")
            return
        search_field = field_of(tag)
        if search_field is None:
            self._unknown_tags.append(f"[{tag}]")
            self._flush(level)
        elif level.quoted is not None:
            text, level.quoted = level.quoted, None
            self._add(level, _tagged(text, search_field, quoted=True))
        else:
            self._add_tagged_words(level, search_field)

    def _take_operator(self, value: str) -> None:
        level = self._levels[-1]
        self._flush(level)
        operator = Operator(value)
        if level.operator is not None:
            self._repairs.append(f"{level.operator.value} before {value} dropped")
        elif not level.operands and operator is not Operator.NOT:
            self._repairs.append(f"leading {value} dropped")
        level.operator = operator

    def _take_open(self, _: str) -> None:
        self._flush(self._levels[-1])
        if len(self._levels) > MAX_DEPTH:
            raise QuerySyntaxError(f"parentheses are nested deeper than {MAX_DEPTH}")
        self._levels.append(_Level())

    def _take_close(self, _: str) -> None:
        if len(self._levels) == 1:
            raise QuerySyntaxError("unbalanced parentheses: a closing one was never opened")
        node = self._end_level(self._levels.pop())
        if node is None:
            self._repairs.append("empty parentheses dropped")
        else:
            self._levels[-1].add(node)

    def _take_stray(self, character: str) -> None:
        self._repairs.append(f"unpaired {character} dropped")

    # From words to operands.

    def _end_level(self, level: _Level) -> Node | None:
        self._flush(level)
        if level.operator is not None:
            self._repairs.append(f"trailing {level.operator.value} dropped")
        return level.node()

    def _add(self, level: _Level, node: Node | None) -> None:
        if node is None:
            self._repairs.append("term without letters or digits dropped")
        else:
            level.add(node)

    def _flush(self, level: _Level) -> None:
        self._flush_quoted(level)
        words, level.words = level.words, []
        if words:
            self._add(level, self._untagged(words))

    def _flush_quoted(self, level: _Level) -> None:
        if level.quoted is not None:
            text, level.quoted = level.quoted, None
            self._add(level, _phrase(text, ALL_FIELDS, quoted=True, droppable=True))

    def _add_tagged_words(self, level: _Level, search_field: Field) -> None:
        """A tag holds for the whole run of words before it, but a date or an id is its last word only."""
        words, level.words = level.words, []
        node = _tagged(" ".join(words), search_field, quoted=False)
        if search_field.kind in (FieldKind.DATE, FieldKind.ID) and len(words) > 1:
            self._add(level, self._untagged(words[:-1]))
            node = _tagged(words[-1], search_field, quoted=False)
        self._add(level, node)

    def _untagged(self, words: list[str]) -> Node | None:
        """A run of untagged words: one operand that requires all of them, stopwords left out."""
        terms: list[Node] = []
        ignored: list[str] = []
        for piece in _PIECES.findall(" ".join(words)):
            if piece.lower() in STOPWORDS:
                ignored.append(piece)
            elif term := _phrase(piece, ALL_FIELDS, quoted=False, droppable=True):
                terms.append(term)
        self._ignored += ignored
        if not terms:
            return Ignored(" ".join(ignored)) if ignored else None
        return Group(terms[0], tuple((Operator.AND, term) for term in terms[1:])) if len(terms) > 1 else terms[0]


def _tagged(text: str, search_field: Field, *, quoted: bool) -> Node | None:
    """The operand for text with a known tag, or None if the text holds nothing to search for."""
    text = " ".join(text.split())
    if search_field.kind is FieldKind.TEXT:
        return _phrase(text, search_field, quoted=quoted, droppable=False)
    if search_field.kind is FieldKind.DATE and (days := date_range(text)):
        return DateRange(*days, search_field)
    if search_field == FILTER_FIELD and text.lower() == "all":
        return Everything()
    if search_field.kind is FieldKind.ID:
        return DocumentId(text)
    return Unindexed(text, search_field)


def _phrase(text: str, search_field: Field, *, quoted: bool, droppable: bool) -> Term | None:
    """Adjacent words in a field; a trailing `*` truncates the last one if enough characters precede it."""
    words = tuple(search_words(text))
    if not words:
        return None
    characters = sum(len(word) for word in words)
    prefix = text.rstrip(" .'-").endswith("*") and characters >= MIN_TRUNCATED_CHARACTERS
    # One word with punctuation inside (`p.E1317Q`) is known as it is or not at all. If it is not, PubMed drops
    # it like any unknown word, unless it is hyphenated: that it looks up as a phrase, and finds nothing.
    one_piece = len(_PIECES.findall(text)) == 1
    hyphenated = one_piece and len(words) > 1 and "-" in text.strip("-")
    return Term(
        words=words,
        field=search_field,
        text=text.strip(),
        prefix=prefix,
        splits=not one_piece,
        droppable=droppable and not hyphenated,
        quoted=quoted,
    )
