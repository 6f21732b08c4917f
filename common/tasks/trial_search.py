"""Trial search: rewrite a request (often PICO) into the query that makes ClinicalTrials.gov return the trials
behind it.

Reward: the recall tiers of DeepRetrieval (Jiang et al. 2025, arXiv 2503.00223), the same as for publications.
"""

from __future__ import annotations

from typing import Any, Final

from common.metrics.ranking import retrieval_metrics
from common.tasks.answer import ParsedAnswer
from common.tasks.base import Task, ranking_of
from common.tasks.outcome import EngineKind, Outcome
from common.tasks.row import Row

_ROLE: Final = """\
You are a clinical specialist who looks for clinical trials. You get a request and write the one search query \
that makes ClinicalTrials.gov return the trials the request is about.

A request may be given by its PICO elements:
P - the patients, problem or population studied
I - the intervention or exposure of interest
C - what the intervention is compared with
O - the outcomes that are measured

The registry is searched with the Boolean operators AND, OR and NOT in capitals, parentheses for grouping and \
"quoted phrases"; it finds common synonyms by itself. Trials are registered by condition and intervention, often \
before any outcome is known, so a query with every detail of the request finds nothing."""


class TrialSearch(Task):
    """Trial search scored by recall over the first top_k ids (the paper's cap is 3,000)."""

    name = "trial_search"
    metric = "recall"
    measures = frozenset({"recall", "precision"})
    role = _ROLE
    request_line = "Find the clinical trials for this request:"
    engines: frozenset[EngineKind] = frozenset({"ctgov"})
    default_top_k = 3000

    def __init__(self, *, dated: bool = False, **options: Any) -> None:
        """dated: hold back trials that are younger than the request (the original does not). Other options as
        `Task`.
        """
        super().__init__(**options)
        self.dated = dated

    def measure(self, row: Row, answer: ParsedAnswer, outcome: Outcome) -> dict[str, float]:
        """Set recall and set precision of the first top_k ids."""
        return retrieval_metrics(ranking_of(self, outcome).ids, row.relevant, self.top_k)


TASK = TrialSearch
