"""The parser of Essie: precedence, context operators, ranges, refusals in the service's words, limits."""

from __future__ import annotations

import contextlib
import math
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarders.servers.ctgov import EssieError, parse
from rewarders.servers.ctgov.areas import AREAS, FIELDS, Area, Kind
from rewarders.servers.ctgov.essie import MAX_DEPTH, MAX_QUERY_CHARACTERS, MAX_TERM_WORDS
from rewarders.servers.ctgov.syntax import And, Coverage, Everything, Missing, Node, Not, Or, Range, Term
from rewarders.servers.ctgov.values import bound_of, span_of


def shown(node: Node | None) -> str:
    """A tree in words: fully in parentheses, with the area of a leaf unless it is the default one."""
    match node:
        case None:
            return ""
        case Term():
            phrases = (" | " if node.any_phrase else " & ").join(" ".join(phrase) for phrase in node.phrases)
            area = "" if node.area.name == "BasicSearch" else f"{node.area.name}:"
            coverage = "" if node.coverage is Coverage.CONTAINS else f"{node.coverage.value}:"
            return f"{area}{coverage}<{phrases}>"
        case Range():
            return f"{node.field.name}:[{_bound(node.field.kind, node.low)}..{_bound(node.field.kind, node.high)}]"
        case Missing():
            return f"{node.area.name}:missing"
        case Everything():
            return "all"
        case Not():
            return f"not {shown(node.operand)}"
        case And() | Or():
            word = " and " if isinstance(node, And) else " or "
            return f"({word.join(map(shown, node.operands))})"


def _bound(kind: Kind, value: float) -> str:
    if math.isinf(value):
        return "max" if value > 0 else "min"
    return date.fromordinal(int(value)).isoformat() if kind is Kind.DATE else f"{value:g}"


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("heart", "<heart>"),
        ("heart attack", "<heart & attack>"),
        ('"back pain"', "<back pain>"),
        ("covid-19 vaccine", "<covid 19 & vaccine>"),
        ("youth OR teen", "(<youth> or <teen>)"),
        ("a OR b AND c", "(<a> or (<b> and <c>))"),
        ("a AND b OR c AND d", "((<a> and <b>) or (<c> and <d>))"),
        ("(a OR b) AND c", "((<a> or <b>) and <c>)"),
        # NOT is unary, binds tighter than AND, and takes a whole run of words.
        ("bethesda NOT maryland", "(<bethesda> and not <maryland>)"),
        ("NOT heart attack", "not <heart & attack>"),
        ("a OR NOT b AND c", "(<a> or (not <b> and <c>))"),
        ("NOT NOT a", "<a>"),
        ("(acetaminophen OR aspirin) AND NOT (heart failure OR heart attack)",
         "((<acetaminophen> or <aspirin>) and not (<heart & failure> or <heart & attack>))"),
        # Between operands nothing means AND, and it binds like AND.
        ('"a b" c', "(<a b> and <c>)"),
        ("a (b OR c) d", "(<a> and (<b> or <c>) and <d>)"),
        ('a OR "b" "c"', "(<a> or (<b> and <c>))"),
        ("a AND AND b", "(<a> and <b>)"),
        # Operators count in upper case only; commas are white space; a backslash makes words of them.
        ("diabetes or metformin", "<diabetes & or & metformin>"),
        ("cancer, lung", "<cancer & lung>"),
        ("\\MISSING \\AND x", "<missing & and & x>"),
        ('"a \\"b\\" c"', "<a b c>"),
        ("Sjögren’s µm", "<sjogren s & μm>"),
        ("ALL", "all"),
        ("ALL leukemia", "(all and <leukemia>)"),
        ("diabet*", "<diabet>"),
        ("heart - attack", "<heart & attack>"),
        ("heart AND -", "(<heart> and <>)"),
        ("  \n ", ""),
    ],
)  # fmt: skip
def test_terms_and_precedence(query: str, expected: str) -> None:
    assert shown(parse(query)) == expected


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("AREA[BriefTitle]heart attack AND x", "(BriefTitle:<heart & attack> and <x>)"),
        ("AREA[BriefTitle] heart", "BriefTitle:<heart>"),
        ("AREA[BriefTitle](a OR AREA[Condition]b)", "(BriefTitle:<a> or Condition:<b>)"),
        ("NOT AREA[BriefTitle](a AND b)", "not (BriefTitle:<a> and BriefTitle:<b>)"),
        ("AREA[BriefTitle]NOT a", "not BriefTitle:<a>"),
        ("AREA[protocolSection.conditionsModule.conditions]a", "protocolSection.conditionsModule.conditions:<a>"),
        ("COVERAGE[FullMatch]pain relief", "FullMatch:<pain relief>"),
        ("COVER[StartsWith]pain", "StartsWith:<pain>"),
        ("AREA[LeadSponsorName]COVERAGE[EndsWith]\"Merck & Co.\"", "LeadSponsorName:EndsWith:<merck co>"),
        ("EXPANSION[None]heart attack", "<heart attack>"),
        ("EXPANSION[Concept](heart attack OR \"back pain\")", "(<heart attack> or <back pain>)"),
        ("EXPANSION[Lossy]heart attack", "<heart | attack>"),
        ("EXPANSION[Lossy]\"heart attack\"", "<heart attack>"),
        ("EXPANSION[Concept] NOT (exhaustion OR sleep deprivation)", "not (<exhaustion> or <sleep deprivation>)"),
        ("TILT[StudyFirstPostDate]\"heart attack\"", "<heart attack>"),
        ("SEARCH[Study](a OR b)", "(<a> or <b>)"),
        ("AREA[Phase]PHASE3", "Phase:FullMatch:<phase3>"),
        ("AREA[Phase](phase 2 OR \"Phase 3\")", "(Phase:FullMatch:<phase2> or Phase:FullMatch:<phase3>)"),
        ("AREA[OverallStatus]Not yet recruiting", "OverallStatus:FullMatch:<not yet recruiting>"),
        ("AREA[InterventionType]DIETARY_SUPPLEMENT", "InterventionType:FullMatch:<dietary supplement>"),
    ],
)  # fmt: skip
def test_context_operators_act_on_what_follows(query: str, expected: str) -> None:
    assert shown(parse(query)) == expected


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("AREA[ResultsFirstPostDate]RANGE[01/01/2015, MAX]", "ResultsFirstPostDate:[2015-01-01..max]"),
        ("AREA[StartDate]RANGE[2020-01-01,2020-12-31]", "StartDate:[2020-01-01..2020-12-31]"),
        ("AREA[StartDate]RANGE[2020,2020-02]", "StartDate:[2020-01-01..2020-02-29]"),
        ("AREA[StartDate]2022", "StartDate:[2022-01-01..2022-12-31]"),
        ("AREA[StartDate](2022 OR \"2020-03\")",
         "(StartDate:[2022-01-01..2022-12-31] or StartDate:[2020-03-01..2020-03-31])"),
        ("AREA[EnrollmentCount]RANGE[MIN,500]", "EnrollmentCount:[min..500]"),
        ("AREA[MinimumAge]RANGE[21 years,MAX]", "MinimumAge:[7670.25..max]"),
        ("AREA[MinimumAge]12 months", "MinimumAge:[365.25..365.25]"),
        ("AREA[ResultsFirstPostDate]MISSING", "ResultsFirstPostDate:missing"),
        ("a AND NOT AREA[Phase]MISSING", "(<a> and not Phase:missing)"),
    ],
)  # fmt: skip
def test_ranges_and_missing(query: str, expected: str) -> None:
    assert shown(parse(query)) == expected


@pytest.mark.parametrize(
    ("query", "message"),
    [
        # The words of the service, as quoted in public tests of its clients.
        ("diabetes (unmatched", "missing ')' at '<EOF>'"),
        ("diabetes)", "extraneous input ')' expecting <EOF>"),
        ("(diabetes AND", "inner bool query clause cannot be null"),
        ('"unterminated', "token recognition error at: '\"unterminated'"),
        ('AREA[ConditionSearch]"bad"quote"', "token recognition error at: '\"'"),
        ("AREA[Phase", "mismatched input '<EOF>' expecting ']'"),
        ("AREA[NotARealField]x", "Unknown area name: `NotARealField`"),
        ("AREA[LeadSponsorName]COVERAGE[FullMatc]x", "Invalid coverage: FullMatc"),
        ("RANGE[1, 2]", "RANGE is not supported for multiple (57) fields"),
        (
            "AREA[Phase]PHASE5",
            "Allowed values for enum field `protocolSection.designModule.phases` are "
            "`NA`, `EARLY_PHASE1`, `PHASE1`, `PHASE2`, `PHASE3`, `PHASE4`",
        ),
        ("x " * (MAX_TERM_WORDS + 1), "Too complicated query"),
        # Words of ours, or in part.
        ("heart [diag:0]", "mismatched input '[' expecting"),
        ("heart[tiab]", "mismatched input '[' expecting"),
        ("[177Lu]Lu-PSMA-617", "extraneous input '[' expecting"),
        ("AREA[LeadSponsorName]COV[FullMatch]x", "mismatched input '['"),
        ("a]", "extraneous input ']' expecting <EOF>"),
        ("AND heart", "mismatched input 'AND' expecting"),
        ("a OR OR b", "mismatched input 'OR' expecting"),
        ("a AND OR b", "mismatched input 'OR' expecting"),
        ("()", "mismatched input ')' expecting"),
        ("NOT", "inner bool query clause cannot be null"),
        ("AREA[BriefTitle]", "inner bool query clause cannot be null"),
        ("the AREA of x", "no viable alternative at input 'AREA'"),
        ("AREA[BriefTitle]RANGE[1,2]", "RANGE is not supported for field"),
        ("AREA[StartDate]RANGE[2020]", "RANGE is not supported for field"),
        ("AREA[StartDate]RANGE[2020,soon]", "Invalid bound of RANGE"),
        ("AREA[StartDate]soon", "Invalid value for field"),
        ("EXPANSION[Some]x", "Invalid expansion: Some"),
        ("TILT[Nothing]x", "Unknown area name: `Nothing`"),
        ("SEARCH[Location](x)", "SEARCH[Location] is not supported"),
        ("AREA[BriefTitle]DISTANCE[1,2,3mi]", "DISTANCE is not supported"),
        ("(" * (MAX_DEPTH + 1) + "x" + ")" * (MAX_DEPTH + 1), "Too complicated query"),
        ("x" * (MAX_QUERY_CHARACTERS + 1), "Too complicated query"),
    ],
)
def test_what_the_service_refuses_is_refused(query: str, message: str) -> None:
    with pytest.raises(EssieError) as caught:
        parse(query)
    assert str(caught.value).startswith(message)


def test_limits_are_not_met_by_what_is_allowed() -> None:
    assert shown(parse("(" * MAX_DEPTH + "x" + ")" * MAX_DEPTH)) == "<x>"
    assert isinstance(parse(" ".join(f"w{number}" for number in range(MAX_TERM_WORDS))), Term)
    assert isinstance(parse('"' + "x " * 100 + '"'), Term)
    long = parse(" OR ".join(f"w{number}" for number in range(2000)))
    assert isinstance(long, Or)
    assert len(long.operands) == 2000
    assert isinstance(parse("NOT " * 2000 + "x"), Term)


_WORDS = ("heart", "ALL", "MISSING", '"a b"', "\\AND", "é", "*", "RANGE[1,2]")
_SYNTAX = ("AND", "OR", "NOT", "(", ")", "[", "]", '"', ",", "\\", "AREA[", "AREA", "COVERAGE[FullMatch]")
_PARTS = st.sampled_from((*_WORDS, *_SYNTAX, "AREA[BriefTitle]", "AREA[Phase]", "AREA[x]"))


@settings(max_examples=300)
@given(st.lists(_PARTS, max_size=25).map(" ".join) | st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with contextlib.suppress(EssieError):
        shown(parse(text))


def test_the_areas_have_the_service_s_sizes() -> None:
    """As its "Search Areas" page counts them."""
    sizes = {"BasicSearch": 57, "ConditionSearch": 7, "InterventionSearch": 12, "OutcomeSearch": 9, "TitleSearch": 3}
    sizes |= {"LocationSearch": 5, "IdSearch": 5, "SponsorSearch": 3, "PatientSearch": 47, "EligibilitySearch": 2}
    assert {name: len(AREAS[name].fields) for name in sizes} == sizes
    assert all(len(set(area.fields)) == len(area.fields) for area in AREAS.values())


def test_a_range_field_has_no_words_to_search() -> None:
    assert Area("x", (FIELDS["StartDate"], FIELDS["BriefTitle"])).columns == ("brieftitle",)


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("2012", "2012-01-01", "2012-12-31"),
        ("2012-02", "2012-02-01", "2012-02-29"),
        ("2012/02/03", "2012-02-03", "2012-02-03"),
        ("12/31/2012", "2012-12-31", "2012-12-31"),
    ],
)
def test_dates(text: str, first: str, last: str) -> None:
    assert span_of(text, Kind.DATE) == (date.fromisoformat(first).toordinal(), date.fromisoformat(last).toordinal())
    assert bound_of(text, Kind.DATE, upper=False) == date.fromisoformat(first).toordinal()
    assert bound_of(text, Kind.DATE, upper=True) == date.fromisoformat(last).toordinal()


@pytest.mark.parametrize(
    "text", ["2011-02-29", "2012-13", "2012-00", "0", "13/13/2012", "soon", "", "0000", "２０１２"]
)
def test_what_is_no_date(text: str) -> None:
    assert span_of(text, Kind.DATE) is None


@pytest.mark.parametrize(("text", "days"), [("2 Weeks", 14.0), ("1 Day", 1.0), ("48 hours", 2.0), ("N/A", None)])
def test_ages(text: str, days: float | None) -> None:
    assert span_of(text, Kind.AGE) == (None if days is None else (days, days))
