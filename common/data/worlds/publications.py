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
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from common.data.worlds import lexicon
from common.data.worlds.folders import whole_folder, write_json_lines, write_lines

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


def build_world(
    out_dir: str | Path,
    seed: int = 0,
    *,
    documents: int = 4000,
    train_requests: int = 800,
    test_requests: int = 200,
) -> Path:
    """Write the demo world as a BEIR folder and return the folder; the same seed gives the same bytes.

    `corpus.jsonl` carries `metadata.pub_date` (YYYY/MM/DD). The splits `train` and `test` share no request, and no
    pair of a drug and a condition. The folder appears whole or not at all.

    Args:
        out_dir: folder to make; one that is there already is replaced.
        seed: of everything that is drawn.
        documents: number of documents; at least four for every request.
        train_requests: number of requests in `qrels/train.tsv`.
        test_requests: number of held-out requests in `qrels/test.tsv`.

    Raises:
        ValueError: more requests than there are pairs of drug and condition, or too few documents for them.
    """
    world = literature(seed, documents, train_requests + test_requests)
    with whole_folder(out_dir) as folder:
        _write(folder, world, train_requests)
    return Path(out_dir)


def literature(seed: int, documents: int, requests: int) -> Literature:
    """A literature that answers so many requests.

    Raises:
        ValueError: as `build_world`.
    """
    pairs = DRUGS * len(lexicon.CONDITIONS)
    if requests > pairs:
        raise ValueError(f"{requests} requests but only {pairs} pairs of drug and condition: ask for fewer requests")
    least = max(_STUDIES_PER_PAIR) * requests
    if documents < least:
        raise ValueError(f"{documents} documents are too few for {requests} requests: ask for {least} or more")
    return Literature(random.Random(seed), documents, requests)


class Literature:
    """Everything that is drawn, in one fixed order, from one random generator.

    studies, documents: what the corpus is about and its documents, in order. asked, requests: likewise of the requests.
    """

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

    def relevant(self) -> list[list[int]]:
        """For each request the positions of its documents in the corpus."""
        places: dict[Study, list[int]] = {}
        for place, study in enumerate(self.studies):
            places.setdefault(study, []).append(place)
        return [places[study] for study in self.asked]

    def _studies(self, pairs: Sequence[Study], documents: int, requests: int) -> list[Study]:
        """The pairs that are asked for come first, so that every request has its documents; then the others."""
        counts = [self._rng.choice(_STUDIES_PER_PAIR) for _ in pairs]
        asked = [study for study, count in zip(pairs[:requests], counts, strict=False) for _ in range(count)]
        others = [study for study, count in zip(pairs[requests:], counts[requests:], strict=True) for _ in range(count)]
        studies = (asked + others)[:documents]
        studies += [self._rng.choice(pairs[requests:] or pairs) for _ in range(documents - len(studies))]
        self._rng.shuffle(studies)
        return studies

    def _document(self, study: Study) -> dict[str, object]:
        rng = self._rng
        (naming,) = rng.choices(list(_NAMING), list(_NAMING.values()))
        drug = {
            "generic": study.drug.generic,
            "brand": study.drug.brand,
            "both": f"{study.drug.generic} ({study.drug.brand})",
        }[naming]
        (condition,) = rng.choices(study.condition, _CONDITION_NAMES)
        population, design = rng.choice(lexicon.POPULATIONS), rng.choice(lexicon.DESIGNS)
        title = rng.choice(
            (
                f"{drug} for {condition} in {population}: a {design}",
                f"Effect of {drug} on {rng.choice(lexicon.OUTCOMES)} in {condition}",
                f"{condition} treated with {drug}: a {design}",
            )
        )
        text = " ".join(self._abstract(study, drug, condition, population, design))
        return {"title": _capitalised(title), "text": text, "metadata": {"pub_date": self._day()}}

    def _abstract(self, study: Study, drug: str, condition: str, population: str, design: str) -> Iterator[str]:
        rng = self._rng
        outcome, marker = rng.choice(lexicon.OUTCOMES), rng.choice(lexicon.MARKERS)
        yield f"The role of {drug} in {condition} is uncertain."
        if rng.random() < 0.3:
            yield f"{_capitalised(rng.choice(lexicon.MARKERS))} predict the course of the disease."
        number = rng.randint(24, 980)
        yield f"In this {design} we followed {number} {population} with {condition} for {rng.randint(4, 96)} weeks."
        if rng.random() < 0.3:
            yield f"Patients with a history of {self._other_condition(study)} were excluded."
        yield f"They received {drug} or {self._comparator(study)}."
        if rng.random() < 0.3:
            yield self._people()
        yield f"{_capitalised(outcome)} {rng.choice(lexicon.FINDINGS)} (p = 0.{rng.randint(1, 98):02d})."
        yield f"Changes in {marker} were {rng.choice(('similar', 'larger', 'smaller'))} in both groups."

    def _request(self, study: Study) -> str:
        rng = self._rng
        generic, brand = study.drug.generic, study.drug.brand
        drug = rng.choice(
            (
                f"{generic} ({brand})",
                f"{brand} ({generic})",
                f"{generic}, sold as {brand}",
                f"{brand}, that is {generic}",
                f"{generic} or {brand}",
            )
        )
        # The spelling varies, but a request calls the condition by its usual name.
        condition = study.condition[0]
        population, outcome = rng.choice(lexicon.POPULATIONS), rng.choice(lexicon.OUTCOMES)
        comparator = self._comparator(study)
        text = rng.choice(
            (
                f"P: {population} with {condition}. I: {drug}. C: {comparator}. O: {outcome}.",
                f"Does {drug} change {outcome} in {population} with {condition}, compared with {comparator}?",
                f"In {population} with {condition}, is {drug} better than {comparator} for {outcome}?",
                f"Comparing {drug} with {comparator} for {condition}: {outcome} in {population}.",
            )
        )
        if rng.random() < 0.75:
            text = rng.choice((f"{self._people()} {text}", f"{text} {self._people()}"))
        return text

    def _people(self) -> str:
        rng = self._rng
        surname, site = rng.choice(self._surnames), rng.choice(lexicon.SITES)
        acronym = rng.choice(self._acronyms)
        return rng.choice(
            (
                f"{acronym} protocol, led by {surname} in {site}.",
                f"Investigator {surname}, {site} site, {acronym} group.",
                f"Data come from {surname} and the {acronym} registry of {site}.",
            )
        )

    def _comparator(self, study: Study) -> str:
        if self._rng.random() < 0.45:
            return self._rng.choice(lexicon.PLAIN_COMPARATORS)
        other = self._rng.choice([drug for drug in self._drugs if drug != study.drug])
        return self._rng.choice((other.generic, other.brand))

    def _other_condition(self, study: Study) -> str:
        other = self._rng.choice([names for names in lexicon.CONDITIONS if names != study.condition])
        return self._rng.choice(other)

    def _day(self) -> str:
        day = FIRST_DAY + datetime.timedelta(days=self._rng.randrange((LAST_DAY - FIRST_DAY).days + 1))
        return day.strftime("%Y/%m/%d")


def _drugs(rng: random.Random) -> list[Drug]:
    generics = _names(rng, (lexicon.GENERIC_STEMS, lexicon.GENERIC_MIDDLES, lexicon.GENERIC_ENDINGS), DRUGS)
    brands = _names(rng, (lexicon.BRAND_STARTS, lexicon.BRAND_ENDINGS), DRUGS)
    return [Drug(generic, brand) for generic, brand in zip(generics, brands, strict=True)]


def _names(rng: random.Random, parts: Sequence[Sequence[str]], number: int) -> list[str]:
    return rng.sample(["".join(combination) for combination in product(*parts)], number)


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def _write(folder: Path, world: Literature, train_requests: int) -> None:
    documents = [{"_id": f"d{place:05d}", **document} for place, document in enumerate(world.documents)]
    queries = [{"_id": f"q{place:04d}", "text": text} for place, text in enumerate(world.requests)]
    write_json_lines(folder / "corpus.jsonl", documents)
    write_json_lines(folder / "queries.jsonl", queries)
    judged = [
        [f"q{place:04d}\td{document:05d}\t1" for document in relevant]
        for place, relevant in enumerate(world.relevant())
    ]
    for split, requests in (("train", judged[:train_requests]), ("test", judged[train_requests:])):
        lines = (line for request in requests for line in request)
        write_lines(folder / "qrels" / f"{split}.tsv", ("query-id\tcorpus-id\tscore", *lines))
