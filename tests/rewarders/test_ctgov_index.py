"""The index of study records against a brute-force evaluator, its orders, and how it is built and cached."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.data.beir import DataError
from rewarders.servers.ctgov import EssieError, Index, Search, SortKey, parse
from tests.rewarders.ctgov.essie_oracle import AREAS, Oracle, OracleTrial, Query, text_of

DATA = os.environ.get("DEEPRETRIEVAL_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="needs DEEPRETRIEVAL_DATA")
VOCABULARY = ("heart", "attack", "lung", "aspirin", "covid-19", "19", "or", "rate")
UNKNOWN = ("zebra", "covid-zebra")
TRIALS = 60


def random_trials(seed: int) -> list[OracleTrial]:
    rng = random.Random(seed)

    def texts(most: int, longest: int) -> list[str]:
        return [" ".join(rng.choices(VOCABULARY, k=rng.randint(1, longest))) for _ in range(rng.randint(0, most))]

    trials = []
    for number in range(TRIALS):
        day = f"{rng.randint(2018, 2021)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
        fields = {"BriefTitle": texts(1, 5), "Condition": texts(3, 2), "Keyword": texts(2, 3), "Acronym": texts(1, 1)}
        trials.append(
            OracleTrial(
                id=f"NCT{number + 1:08d}",
                texts={**fields, "InterventionName": texts(2, 2)},
                first_posted=rng.choice([day, day, day[:7], None]),
                enrollment=rng.choice([None, rng.randint(0, 40)]),
                minimum_age=rng.choice([None, "6 Months", "1 Year", "18 Years", "65 Years"]),
                phases=rng.choice([[], ["NA"], ["PHASE2"], ["PHASE2", "PHASE3"]]),
            )
        )
    return trials


def record_of(trial: OracleTrial) -> dict[str, Any]:
    """The trial as a record of the service; what is not there is left out."""
    texts = trial.texts
    first = {key: texts[name][0] for key, name in (("briefTitle", "BriefTitle"), ("acronym", "Acronym")) if texts[name]}
    protocol: dict[str, Any] = {"identificationModule": {"nctId": trial.id, **first}, "conditionsModule": {}}
    for key, name in (("conditions", "Condition"), ("keywords", "Keyword")):
        if texts[name]:
            protocol["conditionsModule"][key] = texts[name]
    protocol["armsInterventionsModule"] = {"interventions": [{"name": name} for name in texts["InterventionName"]]}
    if trial.first_posted:
        protocol["statusModule"] = {"studyFirstPostDateStruct": {"date": trial.first_posted, "type": "ACTUAL"}}
    protocol["designModule"] = {"phases": trial.phases} if trial.phases else {}
    if trial.enrollment is not None:
        protocol["designModule"]["enrollmentInfo"] = {"count": trial.enrollment, "type": "ESTIMATED"}
    if trial.minimum_age:
        protocol["eligibilityModule"] = {"minimumAge": trial.minimum_age}
    return {"protocolSection": protocol, "hasResults": False}


def write_records(folder: Path, records: list[Any], name: str = "studies.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, Oracle]:
    folder = tmp_path_factory.mktemp("ctgov")
    trials = random_trials(seed=11)
    index = Index.of_corpus(write_records(folder / "records", [record_of(t) for t in trials]), folder / "cache")
    return index, Oracle(trials)


def found(index: Index, text: str, *sort: SortKey) -> list[str]:
    node = parse(text)
    total, ids = index.search(Search(queries=(node,) if node else (), sort=sort), limit=TRIALS)
    assert total == len(ids)
    return ids


_piece = st.sampled_from([*VOCABULARY, *UNKNOWN])
_pieces = st.lists(_piece, min_size=1, max_size=3).map(tuple)
_area = st.sampled_from(sorted(AREAS))
_DAYS = ("2018", "2019-06", "2020-02-15", "05/20/2019", "2021-12-31")
_AGES = ("0 months", "1 Year", "12 months", "18 years", "70 Years")
_COUNTS = ("0", "7", "20", "40")


def _ranges(name: str, values: tuple[str, ...]) -> st.SearchStrategy[Query]:
    low, high = st.sampled_from(["MIN", *values]), st.sampled_from(["MAX", *values])
    return st.tuples(st.just("range"), st.just(name), low, high)


_leaf = st.one_of(
    st.tuples(st.just("run"), _pieces),
    st.tuples(st.just("quoted"), _pieces),
    _ranges("StudyFirstPostDate", _DAYS),
    _ranges("EnrollmentCount", _COUNTS),
    _ranges("MinimumAge", _AGES),
    st.tuples(st.just("day"), st.just("StudyFirstPostDate"), st.sampled_from(["2019", "2020-03"])),
    st.tuples(st.just("choice"), st.sampled_from(["PHASE2", "PHASE3", "Phase 3", "phase 2", "NA"])),
    st.tuples(st.just("missing"), st.sampled_from([*sorted(AREAS), "Phase", "StudyFirstPostDate", "EnrollmentCount"])),
    st.just(("all",)),
)


def _larger(operands: st.SearchStrategy[Query]) -> st.SearchStrategy[Query]:
    several = st.lists(operands, min_size=2, max_size=4).map(tuple)
    return st.one_of(
        st.tuples(st.just("and"), several, st.booleans()),
        st.tuples(st.just("or"), several),
        st.tuples(st.just("not"), operands),
        st.tuples(st.just("in"), _area, operands),
        st.tuples(st.just("cover"), st.sampled_from(["Contains", "FullMatch", "StartsWith", "EndsWith"]), operands),
        st.tuples(st.just("expand"), st.sampled_from(["None", "Term", "Concept", "Relaxation", "Lossy"]), operands),
    )


_queries = st.recursive(_leaf, _larger, max_leaves=10)
_patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@settings(_patient, max_examples=400)
@given(query=_queries)
def test_index_equals_brute_force(world: tuple[Index, Oracle], query: Query) -> None:
    index, oracle = world
    text = text_of(query)
    assert set(found(index, text)) == oracle.ids(query), text


@settings(_patient, max_examples=100)
@given(query=_queries, size=st.integers(1, 25))
def test_pages_are_the_whole_in_pieces_and_relevance_only_reorders(
    world: tuple[Index, Oracle], query: Query, size: int
) -> None:
    index, _ = world
    node = parse(text_of(query))
    search = Search(queries=(node,) if node else (), sort=(SortKey("@relevance", True),))
    total, whole = index.search(search, limit=TRIALS)
    pieces = [trial for start in range(0, total + size, size) for trial in index.search(search, start, size)[1]]
    assert pieces == whole
    assert sorted(whole) == sorted(found(index, text_of(query)))


@settings(_patient, max_examples=200)
@given(
    text=st.text(max_size=40)
    | st.lists(st.sampled_from(['"', "(", ")", "[", "AREA[", "]", "\\", ",", "NOT", "OR", "AND", "RANGE[", "ALL"]))
    .map(" ".join)
    .filter(bool)
    | st.text(st.sampled_from('ab*"()[]:-~^{}+.,\\\x00𫝀′\ue000\ue001 AND'), max_size=40)
)
def test_no_text_breaks_the_search(world: tuple[Index, Oracle], text: str) -> None:
    with contextlib.suppress(EssieError):
        found(world[0], text, SortKey("@relevance", True))


def test_marks_of_values_cannot_be_searched(world: tuple[Index, Oracle]) -> None:
    assert found(world[0], "\ue000") == []
    assert found(world[0], '"\ue000 heart"') == found(world[0], "heart")


def test_very_long_queries_are_answered(world: tuple[Index, Oracle]) -> None:
    index, oracle = world
    words = [f"w{number}" for number in range(1500)]
    assert set(found(index, " OR ".join([*words, "heart"]), SortKey("@relevance", True))) == oracle.ids(
        ("run", ("heart",))
    )


# Order.


def test_the_last_posted_come_first_and_undated_ones_last(world: tuple[Index, Oracle]) -> None:
    index, oracle = world
    posted = {trial.id: ((trial.first_posted or "0") + "-01")[:10] for trial in oracle.trials}
    days = [posted[trial] for trial in found(index, "ALL")]
    assert days == sorted(days, reverse=True)
    assert days[0] > days[-1]


@pytest.mark.parametrize("descending", [True, False])
def test_sorting_by_a_number_puts_missing_ones_last(world: tuple[Index, Oracle], descending: bool) -> None:
    index, oracle = world
    counts = {trial.id: trial.enrollment for trial in oracle.trials}
    ordered = [counts[trial] for trial in found(index, "ALL", SortKey("EnrollmentCount", descending))]
    known = [count for count in ordered if count is not None]
    assert ordered == sorted(known, reverse=descending) + [None] * (len(ordered) - len(known))
    assert 0 < len(known) < len(ordered)


def test_a_second_key_orders_equals(world: tuple[Index, Oracle]) -> None:
    index, oracle = world
    keys = (SortKey("EnrollmentCount", False), SortKey("StudyFirstPostDate", False))
    trials = {trial.id: trial for trial in oracle.trials}
    dated = "NOT AREA[StudyFirstPostDate]MISSING NOT AREA[EnrollmentCount]MISSING"
    ordered = [(trials[i].enrollment, trials[i].number("StudyFirstPostDate")) for i in found(index, dated, *keys)]
    assert ordered == sorted(ordered)


def test_relevance_weighs_fields(tmp_path: Path) -> None:
    def record(number: int, **fields: Any) -> dict[str, Any]:
        return record_of(
            OracleTrial(
                f"NCT{number:08d}",
                {"BriefTitle": ["x"], "Condition": [], "Keyword": [], "Acronym": [], "InterventionName": [], **fields},
                "2020-01-01",
                None,
                None,
            )
        )

    records = [record(n, Keyword=["gout"]) for n in (1, 2)] + [record(3, Acronym=["gout"])]
    records += [record(n) for n in range(4, 20)]
    index = Index.of_corpus(write_records(tmp_path / "r", records), tmp_path / "cache")
    assert found(index, "gout", SortKey("@relevance", True))[0] == "NCT00000003"
    assert found(index, "NOT gout OR gout", SortKey("@relevance", True))[0] == "NCT00000003"


# Records and the index file.


def test_records_come_back_as_they_were(world: tuple[Index, Oracle]) -> None:
    index, oracle = world
    for trial in oracle.trials[:10]:
        assert index.record(trial.id) == record_of(trial)


def test_files_of_every_form_are_read_and_the_last_update_counts(tmp_path: Path) -> None:
    def record(number: int, title: str, updated: str) -> dict[str, Any]:
        return {
            "protocolSection": {
                "identificationModule": {"nctId": f"NCT{number:08d}", "briefTitle": title},
                "statusModule": {"lastUpdatePostDateStruct": {"date": updated}},
            }
        }

    folder = tmp_path / "records"
    write_records(folder, [record(1, "old", "2020-01-01"), record(2, "newest", "2024-01-01")], "a.json")
    (folder / "b.json").write_text(json.dumps({"studies": [record(1, "new", "2021-01-01")], "totalCount": 1}))
    (folder / "c.json").write_text(json.dumps(record(3, "alone", "2020-01-01")))
    (folder / "d.jsonl").write_text(json.dumps(record(2, "older", "2023-01-01")) + "\n\n")
    (folder / "NOTES.md").write_text("not read")
    index = Index.of_corpus(folder, tmp_path / "cache")
    assert len(index) == 3
    assert found(index, "old OR older") == []
    assert len(found(index, "new OR newest OR alone")) == 3


def test_a_beir_folder_is_served_with_its_dates_or_made_up_ones(tmp_path: Path) -> None:
    rows = [
        {"_id": "NCT00000001", "title": "Old", "text": "gout", "metadata": {"pub_date": "2001/02/03"}},
        {
            "_id": "NCT00000002",
            "title": "New",
            "text": "gout",
            "metadata": {"pub_date": "2003", "phase": "Phase 1/Phase 2"},
        },
        {
            "_id": "x-3",
            "title": "Undated",
            "text": "gout",
            "metadata": {"diseases_list": ["Hay fever"], "drugs_list": ["Zinc"], "enrollment": "12.0", "phase": "N/A"},
        },
    ]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = Index.of_corpus(tmp_path, tmp_path / "cache")
    assert found(index, "gout") == ["x-3", "NCT00000002", "NCT00000001"]
    assert found(index, "AREA[StudyFirstPostDate]RANGE[MIN,2002]") == ["NCT00000001"]
    assert found(index, 'AREA[Condition]"hay fever" AND AREA[InterventionName]zinc') == ["x-3"]
    assert found(index, "AREA[Phase]PHASE2 OR AREA[EnrollmentCount]12") == ["x-3", "NCT00000002"]
    assert found(index, "AREA[BriefTitle]old") == ["NCT00000001"]


def test_the_index_is_built_once_per_content_and_so_is_its_time(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    def opened(seed: int) -> Index:
        folder = write_records(tmp_path / "r", [record_of(trial) for trial in random_trials(seed)])
        return Index.of_corpus(folder, tmp_path / "cache", lambda done, total: calls.append((done, total)))

    first = opened(1).data_timestamp
    assert calls == [(0, TRIALS), (TRIALS, TRIALS)]
    assert opened(1).data_timestamp == first
    assert len(calls) == 2
    assert opened(2).data_timestamp != first
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    folder = write_records(tmp_path / "r", [record_of(trial) for trial in random_trials(1)])
    with pytest.raises(KeyboardInterrupt):
        Index.of_corpus(folder, tmp_path / "cache", interrupt)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("5", "no list of studies"),
        ("[5]", "study 1: not a JSON object"),
        ('[{"protocolSection": {}}]', r"study 1: no study record.*nctId"),
        ('{"studies": 5}', "no list of studies"),
    ],
)
def test_unusable_records_are_one_clear_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        Index.of_corpus(tmp_path, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_records_and_bad_dates_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no study records"):
        Index.of_corpus(tmp_path / "nowhere", tmp_path / "cache")
    row = {"_id": "d", "title": "", "text": "", "metadata": {"pub_date": "spring"}}
    (tmp_path / "corpus.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="'spring' is no date"):
        Index.of_corpus(tmp_path, tmp_path / "cache")


def test_a_damaged_index_file_is_named(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "r", [record_of(trial) for trial in random_trials(1)])
    Index.of_corpus(folder, tmp_path / "cache").close()
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(b"not a database" * 100)
    with pytest.raises(DataError, match="remove the file"):
        Index.of_corpus(folder, tmp_path / "cache")


@needs_data
def test_real_records_are_found_by_what_they_say(tmp_path: Path) -> None:
    """The expected ids are read from the records themselves."""
    folder = Path(str(DATA)) / "ctgov_trials"
    index = Index.of_corpus(folder, tmp_path / "cache")
    studies = [study for path in sorted(folder.glob("*.json")) for study in json.loads(path.read_text())]
    protocols = {s["protocolSection"]["identificationModule"]["nctId"]: s["protocolSection"] for s in studies}
    assert len(index) == len(protocols) == 151

    def expected(holds: Any) -> set[str]:
        return {trial for trial, protocol in protocols.items() if holds(protocol)}

    def of(query: str) -> set[str]:
        node = parse(query)
        assert node is not None
        return set(index.search(Search(queries=(node,)))[1])

    phase2 = expected(lambda p: "PHASE2" in p["designModule"].get("phases", []))
    assert of("AREA[Phase]PHASE2") == phase2 != set()
    no_phase = expected(lambda p: not p["designModule"].get("phases"))
    assert of("AREA[Phase]MISSING") == no_phase != set()
    recent = expected(lambda p: p["statusModule"]["studyFirstPostDateStruct"]["date"] >= "2023-06-01")
    assert of("AREA[StudyFirstPostDate]RANGE[06/01/2023, MAX]") == recent != set()
    titled = expected(lambda p: re.search(r"\bpain\b", p["identificationModule"]["briefTitle"], re.IGNORECASE))
    assert of("AREA[BriefTitle]pain") == titled != set()
    large = expected(lambda p: p["designModule"]["enrollmentInfo"]["count"] >= 200)
    assert of("AREA[EnrollmentCount]RANGE[200,MAX]") == large != set()
    assert of("AREA[Phase]PHASE2 NOT AREA[EnrollmentCount]RANGE[200,MAX]") == phase2 - large
