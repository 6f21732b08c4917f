"""The evidence world: passages about made-up people, and questions whose answer stands in one passage each.

A question names the person it asks about, and an archive, its site and its founder, which have nothing to do with the
answer. Dozens of passages about those hold more of the question's words than the one with the answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from common.data.worlds import lexicon
from common.data.worlds.folders import whole_folder, write_json_lines, write_rows
from common.tasks.row import Row

# ruff: noqa: SIM905 - word lists are read and edited as text

FIRST_NAMES = "Anna Boris Clara David Elena Felix Greta Henry Irene Jonas Karin Leo Marta Nils Olga Pavel".split()
PROFESSIONS = "painter chemist composer botanist engineer poet physician architect historian sailor".split()
_PLACE_PARTS = (
    "Ard Bel Cor Dun Esk Fal Glen Har Inver Kil Lan Mor Nor Oban Pen Quin Ross Sten Tor Ulv".split(),
    "mouth wick ford dale minster haven stead thorpe combe moor".split(),
)
MOST_FACTS = 800  # so many names are there for answers
# What a passage says, and two ways of asking for it; the answer is a made-up place or name that stands nowhere else.
_FACTS = (
    (
        "{person} was born in {answer} as the child of a {trade}.",
        ("Where was {person} born?", "In which village was {person} born?"),
    ),
    (
        "{person} studied under {answer} and admired his teacher.",
        ("Who was the teacher of {person}?", "Under whom has {person} studied?"),
    ),
    (
        "{person} was buried in {answer}, far from home.",
        ("Where was {person} buried?", "Where lies {person} buried?"),
    ),
)
_FILLERS = (
    "{person} wrote to {stranger} about the weather.",
    "The {archive} archive of {site} keeps letters from {person} to {stranger}.",
    "{person}, a {trade}, travelled to {site} twice.",
    "{person} received a medal in {site}.",
)
_ABOUT_CIRCLES = (
    "{stranger} founded the {archive} archive of {site} and asks every {trade} to write.",
    "The {archive} archive of {site} was led by {stranger}, the {trade}.",
    "Letters to {stranger} are kept in the {archive} archive of {site}.",
    "{stranger} of {site} opened the {archive} archive to every {trade}.",
)
_NOISE = (
    "According to the {archive} archive of {site} and letters to {stranger}: {question}",
    "{question} The {archive} archive of {site} and {stranger} may know.",
    "{stranger} asks the {archive} archive of {site}: {question}",
)


@dataclass(frozen=True, slots=True)
class Fact:
    """person: full name. kind: place in `_FACTS`."""

    person: str
    kind: int
    answer: str


def build_world(
    folder: str | Path,
    seed: int = 0,
    *,
    people: int = 160,
    train_questions: int = 360,
    test_questions: int = 80,
    circles: int = 40,
    passages_per_circle: int = 30,
) -> Path:
    """Write corpus.jsonl and rows/{train,test}.jsonl; the same seed gives the same bytes.

    Raises:
        ValueError: more questions than there are facts about so many people, or more facts than names for answers.
    """
    facts = people * len(_FACTS)
    if not train_questions + test_questions <= facts <= MOST_FACTS:
        raise ValueError(f"{people} people have {facts} facts: one per question is needed, {MOST_FACTS} are the most")
    world = _World(random.Random(seed), people, circles, passages_per_circle)
    questions = world.questions(train_questions + test_questions)
    with whole_folder(folder) as target:
        documents = ({"_id": f"p{place:05d}", "title": "", "text": text} for place, text in enumerate(world.passages))
        write_json_lines(target / "corpus.jsonl", documents)
        write_rows(target, "train", questions[:train_questions])
        write_rows(target, "test", questions[train_questions:])
    return Path(folder)


@dataclass(frozen=True, slots=True)
class Circle:
    """An archive, where it is, and whose it is."""

    archive: str
    site: str
    stranger: str


class _World:
    """Everything that is drawn, in one fixed order, from one random generator."""

    def __init__(self, rng: random.Random, people: int, circles: int, passages_per_circle: int) -> None:
        self._rng = rng
        surnames = ["".join(parts) for parts in product(lexicon.SURNAME_STARTS, lexicon.SURNAME_ENDINGS)]
        rng.shuffle(surnames)
        self._people = _full_names(rng, surnames[: people // 4], people)
        self._circles = _circles(rng, surnames[people // 4 :], circles)
        answers = iter(_answers(rng))
        self.facts = [Fact(name, kind, next(answers)) for name in self._people for kind in range(len(_FACTS))]
        self.passages = [self._filled(_FACTS[fact.kind][0], fact.person, answer=fact.answer) for fact in self.facts]
        self.passages += [self._filled(rng.choice(_FILLERS), rng.choice(self._people)) for _ in range(2 * people)]
        self.passages += [
            self._filled(rng.choice(_ABOUT_CIRCLES), "", circle)
            for circle in self._circles
            for _ in range(passages_per_circle)
        ]
        rng.shuffle(self.passages)

    def questions(self, number: int) -> list[Row]:
        """Questions about different facts."""
        facts = self._rng.sample(self.facts, number)
        return [self._question(place, fact) for place, fact in enumerate(facts)]

    def _question(self, place: int, fact: Fact) -> Row:
        question = self._rng.choice(_FACTS[fact.kind][1]).format(person=fact.person)
        text = self._filled(self._rng.choice(_NOISE), fact.person, question=question)
        return Row(f"e{place:04d}", text, answers=(fact.answer,))

    def _filled(self, text: str, person: str, circle: Circle | None = None, **more: str) -> str:
        circle = circle or self._rng.choice(self._circles)
        return text.format(
            person=person,
            stranger=circle.stranger,
            archive=circle.archive,
            site=circle.site,
            trade=self._rng.choice(PROFESSIONS),
            **more,
        )


def _circles(rng: random.Random, surnames: Sequence[str], number: int) -> list[Circle]:
    archives = rng.sample(["".join(parts) for parts in product(*lexicon.ACRONYM_PARTS)], number)
    sites = rng.sample(lexicon.SITES, number)
    strangers = _full_names(rng, surnames, number)
    return [Circle(*names) for names in zip(archives, sites, strangers, strict=True)]


def _full_names(rng: random.Random, surnames: Sequence[str], number: int) -> list[str]:
    return [f"{first} {last}" for first, last in rng.sample(list(product(FIRST_NAMES, surnames)), number)]


def _answers(rng: random.Random) -> list[str]:
    """Made-up names of two words, each once, so that none is found within another."""
    places = ["".join(parts) for parts in product(*_PLACE_PARTS)]
    names = [f"{place} {second}" for place in places for second in ("Green", "Hill", "Bridge", "Cross")]
    rng.shuffle(names)
    return names
