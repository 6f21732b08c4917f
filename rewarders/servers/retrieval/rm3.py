"""RM3, pseudo-relevance feedback: the first ranking of a query says by which terms it is searched again.

The relevance model is that of Lavrenko and Croft (2001), mixed with the query as in Abdul-Jaleel et al. (2004). What
they leave open is Anserini's (`Rm3Reranker`), and so are the defaults: of each of the first 10 documents its 10 most
frequent terms, of all these the 10 heaviest, half of the weight to the query. The arithmetic is Anserini's too, in
single precision, so that the rankings are the same to the last tie.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

FEEDBACK_DOCUMENTS: Final = 10
FEEDBACK_TERMS: Final = 10
QUERY_WEIGHT: Final = 0.5
# Terms that are in more of the documents say nothing; it stands in for a list of stop words.
COMMONEST: Final = np.float32(0.1)
_TERM: Final = re.compile(r"[a-z0-9]{2,20}")

_Weights = dict[str, float]


class FeedbackDocument(NamedTuple):
    """A document of the first ranking. score: there. terms: all of its analyzed text."""

    score: float
    terms: Sequence[str]


def expanded_query(
    query: Sequence[str], documents: Sequence[FeedbackDocument], is_common: Callable[[str], bool]
) -> _Weights:
    """Term -> weight of the second query.

    P(t | RM3) = w · P(t | query) + (1 - w) · P(t | relevance model), w = QUERY_WEIGHT.

    Args:
        query: the terms of the analyzed query, not empty.
        documents: the first FEEDBACK_DOCUMENTS of its ranking, best first, or as many as there are.
        is_common: whether a term is in more than COMMONEST of all documents.
    """
    counts = Counter(query)
    asked = _distribution(list(counts), np.array(list(counts.values()), dtype=np.float32))
    fed_back = relevance_model(documents, is_common)
    kept = np.float32(QUERY_WEIGHT)
    return {
        term: float(np.float32(float(kept * np.float32(asked.get(term, 0.0))) + (1.0 - kept) * fed_back.get(term, 0.0)))
        for term in [*asked, *(term for term in fed_back if term not in asked)]
    }


def relevance_model(documents: Sequence[FeedbackDocument], is_common: Callable[[str], bool]) -> _Weights:
    """Term -> P(t | relevance model), the sum over the documents of P(t | document) · score, of the heaviest terms."""
    vectors = [_document_terms(document.terms, is_common) for document in documents]
    vocabulary = sorted(set().union(*vectors))
    weights = np.zeros(len(vocabulary), dtype=np.float32)
    for document, vector in zip(documents, vectors, strict=True):
        if vector:
            counts = np.array([vector.get(term, 0) for term in vocabulary], dtype=np.float32)
            weights += counts / counts.sum() * np.float32(document.score)
    heaviest = np.argsort(-weights, kind="stable")[:FEEDBACK_TERMS]  # of equal ones the first of the alphabet
    return _distribution([vocabulary[place] for place in heaviest], weights[heaviest])


def _document_terms(terms: Sequence[str], is_common: Callable[[str], bool]) -> Mapping[str, int]:
    """The most frequent terms that may be fed back, and how often they occur."""
    counts = Counter(terms)
    # Sorted first: so only a few terms have to be looked up in the index.
    ordered = sorted(counts, key=lambda term: (-counts[term], term))
    usable = (term for term in ordered if _TERM.fullmatch(term) and not is_common(term))
    return {term: counts[term] for term in islice(usable, FEEDBACK_TERMS)}


def _distribution(terms: Sequence[str], weights: npt.NDArray[np.float32]) -> _Weights:
    """Weights that sum to 1, [terms]; {} for none."""
    shares = (weights / weights.sum(dtype=np.float64)).astype(np.float32)
    return dict(zip(terms, shares.tolist(), strict=True))
