"""The fault soak: a short one through real processes, and that it would see a score that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fault_soak import Tally, parser, soak
from common.scores import InvalidOutput, Scored

GOOD = Scored(6.0, {"recall": 1.0}, "heart", 3)
BAD = InvalidOutput(-4.0, "refused_query")


@pytest.mark.slow
@pytest.mark.parametrize("service", ["pubmed", "ctgov"])
async def test_scores_survive_faults_and_an_outage(tmp_path: Path, service: str) -> None:
    options = "--minutes 0.03 --outage 1 --retry-after 0.5 --rewarders 1 --groups-per-s 6 --documents 500"
    report = await soak(tmp_path, parser().parse_args([*options.split(), "--services", service]))
    assert (report["lost"], report["invented"], report["different"]) == (0, 0, 0)
    assert report["scored"] >= 24
    assert report["released"] > 0, "no group ever had to wait: the soak shows nothing"
    part = report["services"][service]
    assert part["answers"] > part["faults"] >= 10
    assert len(part["faults_by_kind"]) >= 6


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [
        ([GOOD, BAD], (0, 0, 0)),
        ([], (2, 0, 0)),
        ([GOOD, GOOD], (0, 1, 1)),
        ([Scored(6.0, {"recall": 1.0}, "heart", 2), BAD], (0, 0, 1)),
    ],
)
def test_what_is_lost_invented_or_different_is_counted(
    scores: list[Scored | InvalidOutput], verdict: tuple[int, int, int]
) -> None:
    tally = Tally()
    tally.add(scores, [GOOD, BAD])
    report = tally.report()
    assert (report["lost"], report["invented"], report["different"]) == verdict
