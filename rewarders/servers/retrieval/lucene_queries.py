"""From the text of a query to a Lucene query.

A bag of words becomes what pyserini makes of it: one clause per distinct stem, weighted by how often it occurs. Parts
of a Boolean query that match add their BM25 scores; a prefix adds 1 whatever it matches, and what is only excluded adds
nothing: a query of nothing but NOT matches every other document with score 0, in the order of their ids.
"""

from __future__ import annotations

from typing import Any, Final

from rewarders.servers.retrieval.boolean_query import And, Node, Not, Or, Phrase, Prefix, Words, parse
from rewarders.servers.retrieval.lucene_index import FIELD, analyzer
from rewarders.servers.retrieval.lucene_jvm import as_java, java_class

_BOOLEAN_QUERY: Final = "org.apache.lucene.search.BooleanQuery"


class QueryBuilder:
    """Builds queries; threads may share it. boolean: texts are in the language of `boolean_query`."""

    def __init__(self, boolean: bool) -> None:
        self._boolean = boolean
        self._analyzer = analyzer()
        self._bags = java_class("io.anserini.search.query.BagOfWordsQueryGenerator")()
        self._phrases = java_class("org.apache.lucene.util.QueryBuilder")(self._analyzer)
        self._builder = java_class(f"{_BOOLEAN_QUERY}$Builder")
        self._everything = java_class("org.apache.lucene.search.MatchAllDocsQuery")()
        self._prefix = java_class("org.apache.lucene.search.PrefixQuery")
        self._term = java_class("org.apache.lucene.index.Term")
        occur = java_class("org.apache.lucene.search.BooleanClause$Occur")
        self._must, self._should, self._must_not, self._filter = (
            occur.MUST, occur.SHOULD, occur.MUST_NOT, occur.FILTER,
        )  # fmt: skip

    def build(self, text: str) -> Any:
        """The query, or None where the analyzer leaves nothing of it.

        Raises:
            BooleanSyntaxError: the text is no Boolean query. A Java exception: it has too many clauses.
        """
        return self._node(parse(text)) if self._boolean else self.words(text)

    def _node(self, node: Node) -> Any:
        match node:
            case Words(text):
                return self.words(text)
            case Phrase(text):
                return self._phrases.createPhraseQuery(FIELD, text)
            case Prefix(text):
                return self._prefix(self._term(FIELD, text))
            case Or(parts):
                return self._or(parts)
            case And(parts):
                return self._and(parts)
            case Not():
                return self._and((node,))

    def words(self, text: str) -> Any:
        """As `build`, of a bag of words."""
        query = as_java(_BOOLEAN_QUERY, self._bags.buildQuery(FIELD, self._analyzer, text))
        clauses = query.clauses()  # in a variable: see `java_class`
        return query if clauses.size() else None

    def _or(self, parts: tuple[Node, ...]) -> Any:
        queries = [query for part in parts if (query := self._node(part)) is not None]
        if len(queries) < 2:
            return queries[0] if queries else None
        builder = self._builder()
        for query in queries:
            builder.add(query, self._should)
        return builder.build()

    def _and(self, parts: tuple[Node, ...]) -> Any:
        """All positive parts and no negative one. Without a positive part: everything else."""
        wanted = [self._node(part) for part in parts if not isinstance(part, Not)]
        unwanted = [self._node(part.part) for part in parts if isinstance(part, Not)]
        wanted, unwanted = [q for q in wanted if q is not None], [q for q in unwanted if q is not None]
        if not unwanted and len(wanted) < 2:
            return wanted[0] if wanted else None
        builder = self._builder()
        for query in wanted:
            builder.add(query, self._must)
        for query in unwanted:
            builder.add(query, self._must_not)
        if not wanted:
            builder.add(self._everything, self._filter)
        return builder.build()
