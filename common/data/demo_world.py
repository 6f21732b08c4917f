"""The demo world: a made-up biomedical literature in which it takes the right query to find the right abstracts.

Each request is PICO text (patient, intervention, comparator, outcome) about one drug in one condition, and its
relevant documents are the studies of that drug in that condition. Four things make the obvious queries fail under a
Boolean search that returns the newest 50 hits, as PubMed's esearch does:

* a study names its drug by the generic or by the brand name, seldom by both;
* a condition has spelling variants and synonyms, and shares words with other conditions;
* a drug is also studied in other conditions or is merely the comparator, and a condition with other drugs;
* requests name people, sites and protocols that are rare in the corpus and have nothing to do with the answer.

So the raw request and the AND of its words find nothing, the OR of its words finds the newest of everything, and its
rarest words find a stranger's studies. `(generic OR brand) AND word-of-the-condition` finds nearly all.
"""

from __future__ import annotations

import datetime
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from common.data import demo_lexicon as lexicon

FIRST_DAY = datetime.date(1995, 1, 1)
LAST_DAY = datetime.date(2024, 12, 31)
DRUGS = 36
_STUDIES_PER_PAIR = (2, 3, 3, 4)
# Shares of studies that name their drug by generic name, by brand name, by both.
_NAMING = {"generic": 0.46, "brand": 0.46, "both": 0.08}
# Shares of studies that call the condition by its usual name, and by each of its two other names.
_CONDITION_NAMES = (0.5, 0.3, 0.2)


@dataclass(frozen=True, slots=True)
class Drug:
    """A drug with its two names."""

    generic: str
    brand: str


@dataclass(frozen=True, slots=True)
class Study:
    """What one document is about."""

    drug: Drug
    condition: tuple[str, ...]


def build_demo_world(
    out_dir: str | Path,
    seed: int = 0,
    *,
    documents: int = 3600,
    train_requests: int = 800,
    test_requests: int = 200,
) -> Path:
    """Write the demo world as a BEIR folder and return the folder; the same seed gives the same bytes.

    `corpus.jsonl` carries `metadata.pub_date` (YYYY/MM/DD). The splits `train` and `test` share no request, and no
    pair of a drug and a condition. The folder appears whole or not at all.

    Args:
        out_dir: folder to make; one that is there already is replaced.
        seed: of everything that is drawn.
        documents: number of documents; at least three for every request.
        train_requests: number of requests in `qrels/train.tsv`.
        test_requests: number of held-out requests in `qrels/test.tsv`.

    Raises:
        ValueError: more requests than there are pairs of drug and condition, or too few documents for them.
    """
    pairs = DRUGS * len(lexicon.CONDITIONS)
    requests = train_requests + test_requests
    if requests > pairs:
        raise ValueError(f"{requests} requests but only {pairs} pairs of drug and condition: ask for fewer requests")
    if documents < 3 * requests:
        raise ValueError(f"{documents} documents are too few for {requests} requests: ask for {3 * requests} or more")
    world = _World(random.Random(seed), documents, requests)
    out_dir = Path(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        _write(partial, world, train_requests)
        shutil.rmtree(out_dir, ignore_errors=True)
        os.replace(partial, out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out_dir


class _World:
    """Everything that is drawn, in one fixed order, from one random generator."""

    def __init__(self, rng: random.Random, documents: int, requests: int) -> None:
        self._rng = rng
        self._surnames = _names(rng, (lexicon.SURNAME_STARTS, lexicon.SURNAME_ENDINGS), 60)
        self._acronyms = _names(rng, lexicon.ACRONYM_PARTS, 120)
        self._drugs = _drugs(rng)
        pairs = [Study(drug, condition) for drug, condition in product(self._drugs, lexicon.CONDITIONS)]
        rng.shuffle(pairs)
        self.studies = self._studies(pairs, documents, requests)
        self.asked = pairs[:requests]
        self.documents = [self._document(study) for study in self.studies]
        self.requests = [self._request(study) for study in self.asked]

    def _studies(self, pairs: Sequence[Study], documents: int, requests: int) -> list[Study]:
        """The pairs that are asked for come first, so that every request has its documents; then the others."""
        counts = [self._rng.choice(_STUDIES_PER_PAIR) for _ in pairs]
        asked = [study for study, count in zip(pairs[:requests], counts, strict=False) for _ in range(count)]
        others = [study for study, count in zip(pairs[requests:], counts[requests:], strict=True) for _ in range(count)]
        studies = (asked + others)[:documents]
        studies += [self._rng.choice(pairs[requests:] or pairs) for _ in range(documents - len(studies))]
        self._rng.shuffle(studies)
        return studies
