"""Boolean search with BM25 by brute force, from its definition; shares no code with the parser or with Lucene."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from tests.rewarders.retrieval.worlds import STOPWORD, WORDS

# A query is a tuple: ("word", w) | ("phrase", [w...]) | ("prefix", p) | ("bag", [leaf...]) | ("or", [...]) |
# ("and", [...]) | ("not", query).
Tree = tuple[str, Any]
Scores = dict[str, float]

_word = st.sampled_from([*WORDS, STOPWORD, "absent"])
_leaf = st.one_of(
    st.tuples(st.just("word"), _word),
    st.tuples(st.just("phrase"), st.lists(_word, min_size=1, max_size=3)),
    st.tuples(st.just("prefix"), st.sampled_from(["al", "beta", "gam", "zz", "o", "si"]).filter(lambda p: len(p) > 1)),
)
trees: st.SearchStrategy[Tree] = st.recursive(
    st.one_of(_leaf, st.tuples(st.just("bag"), st.lists(_leaf, min_size=1, max_size=4))),
    lambda part: st.one_of(
        st.tuples(st.sampled_from(["or", "and"]), st.lists(part, min_size=2, max_size=3)),
        st.tuples(st.just("not"), part),
    ),
    max_leaves=8,
)


def written(tree: Tree) -> str:
    """The query as text, with parentheses around everything that has parts."""
    kind, parts = tree
    match kind:
        case "word":
            return str(parts)
        case "phrase":
            return f'"{" ".join(parts)}"'
        case "prefix":
            return f"{parts}*"
        case "not":
            return f"NOT ({written(parts)})"
        case "bag":
            return " ".join(map(written, parts))
    return f" {kind.upper()} ".join(f"({written(part)})" for part in parts)


class Oracle:
    """Evaluates queries over documents: id -> (title, text)."""

    def __init__(self, documents: dict[str, tuple[str, str]], k1: float, b: float) -> None:
        self._words = {key: f"{title} {text}".split() for key, (title, text) in documents.items()}
        self._lengths = {key: sum(word != STOPWORD for word in words) for key, words in self._words.items()}
        lengths = [length for length in self._lengths.values() if length]
        self._mean = sum(lengths) / len(lengths)
        self._with_words = len(lengths)
        self._k1, self._b = k1, b

    def scores(self, tree: Tree) -> Scores | None:
        """Score of every document that matches; None where nothing is left of the query."""
        kind, parts = tree
        match kind:
            case "word":
                return None if parts == STOPWORD else self._bm25(lambda words: words.count(parts), [parts])
            case "phrase":
                return self._phrase(parts)
            case "prefix":
                return {key: 1.0 for key, words in self._words.items() if any(w.startswith(parts) for w in words)}
            case "not":
                return self._and([tree])
            case "and":
                return self._and(parts)
        return self._or(parts)

    def _or(self, parts: list[Tree]) -> Scores | None:
        found = [scores for part in parts if (scores := self.scores(part)) is not None]
        total: Counter[str] = Counter()
        for scores in found:
            total.update(scores)
        return dict(total) if found else None

    def _and(self, parts: list[Tree]) -> Scores | None:
        wanted = [self.scores(part) for part in parts if part[0] != "not"]
        unwanted = [self.scores(part[1]) for part in parts if part[0] == "not"]
        given = [scores for scores in wanted if scores is not None]
        excluded = [scores for scores in unwanted if scores is not None]
        if not given and not excluded:
            return None
        left = set(self._words).intersection(*given).difference(*excluded)
        return {key: sum(scores[key] for scores in given) for key in left}

    def _phrase(self, words: list[str]) -> Scores | None:
        """A stopword in a phrase stands for any word in its place."""
        wanted = [(place, word) for place, word in enumerate(words) if word != STOPWORD]
        if not wanted:
            return None
        first = wanted[0][0]

        def occurrences(text: list[str]) -> int:
            return sum(
                all(begin + place - first < len(text) and text[begin + place - first] == word for place, word in wanted)
                for begin in range(len(text))
            )

        return self._bm25(occurrences, [word for _, word in wanted])

    def _bm25(self, count: Callable[[list[str]], int], words: list[str]) -> Scores:
        """Lucene's variant: no factor k1 + 1; a phrase has the sum of its words' idf."""
        idf = 0.0
        for word in words:
            frequency = sum(word in text for text in self._words.values())
            idf += math.log(1 + (self._with_words - frequency + 0.5) / (frequency + 0.5))
        scores = {}
        for key, text in self._words.items():
            if occurrences := count(text):
                norm = self._k1 * (1 - self._b + self._b * self._lengths[key] / self._mean)
                scores[key] = idf * occurrences / (occurrences + norm)
        return scores
