"""Publication search: rewrite a request (often PICO) into the query that makes PubMed return the relevant
articles.

Reward: the recall tiers of DeepRetrieval (Jiang et al. 2025, arXiv 2503.00223, section on reward design, with
the values of its published code).
"""

from __future__ import annotations

from typing import Final

from common.metrics.ranking import retrieval_metrics
from common.tasks.answer import ParsedAnswer
from common.tasks.base import Task, ranking_of
from common.tasks.outcome import EngineKind, Outcome
from common.tasks.row import Row

_ROLE: Final = """\
You are a clinical specialist who searches the biomedical literature for systematic reviews. You get a \
request and write the one search query that makes the search engine return the publications the request is \
about.

A request may be given by its PICO elements:
P - the patients, problem or population studied
I - the intervention or exposure of interest
C - what the intervention is compared with
O - the outcomes that are measured

The search engine understands the Boolean operators AND, OR and NOT in capitals, parentheses for grouping, \
"quoted phrases" and truncation with *. A query that is too narrow misses publications; one that is too \
broad buries them."""


class PublicationSearch(Task):
    """Publication search scored by recall over the first top_k ids (the paper's cap is 3,000)."""

    name = "publication_search"
    metric = "recall"
    measures = frozenset({"recall", "precision"})
    role = _ROLE
    request_line = "Find the publications for this request:"
    dated = True
    engines: frozenset[EngineKind] = frozenset({"pubmed"})
    default_top_k = 3000

    def measure(self, row: Row, answer: ParsedAnswer, outcome: Outcome) -> dict[str, float]:
        """Set recall and set precision of the first top_k ids."""
        return retrieval_metrics(ranking_of(self, outcome).ids, row.relevant, self.top_k)


TASK = PublicationSearch
