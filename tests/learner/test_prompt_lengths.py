"""Prompts that are too long: counted as an actor would send them, and set aside by name, whatever happens."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from actors.prompts import chat_encoder
from common import messages as m
from common.data.beir import DataError
from common.tasks import Row
from common.tasks.publication_search import PublicationSearch
from learner.ledger import TicketLedger
from learner.prompt_lengths import PROMPT_TOO_LONG, issue_fitting, log_too_long, prompt_tokens, too_long
from learner.prompts import PromptStream

SAMPLING = m.Sampling(samples=2, temperature=1.0, top_p=1.0, max_tokens=16)
ROWS = [Row(f"q{n}", "breast cancer " * (1 + 40 * (n % 3 == 2)), ("d",)) for n in range(9)]


@pytest.mark.parametrize("prefill", [False, True])
def test_tokens_are_those_an_actor_sends(model_dir: Path, prefill: bool) -> None:
    task = PublicationSearch(prompt="short", prefill=prefill)
    encode = chat_encoder(model_dir, task.response_prefix)
    sent = [len(encode([m.ChatMessage(**message) for message in task.messages(row)])) for row in ROWS]
    assert prompt_tokens(model_dir, task)(ROWS) == sent
    assert len(set(sent)) == 2


def test_the_limit_itself_fits(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    count = prompt_tokens(model_dir, PublicationSearch(prompt="short"))
    longest = max(count(ROWS))
    assert too_long(ROWS, count, longest) == frozenset()
    found = too_long(ROWS, count, longest - 1)
    assert found == {"q2", "q5", "q8"}
    with caplog.at_level(logging.WARNING):
        log_too_long(found, ROWS, longest - 1, "train")
    assert f"3 of 9 requests of train have prompts of more than {longest - 1} tokens (q2 for one)" in caplog.text
    with pytest.raises(DataError, match=r"every prompt has more than 1 tokens: raise actor\.max_model_len"):
        too_long(ROWS, count, 1)


def test_the_others_keep_their_positions() -> None:
    task = PublicationSearch(prompt="short")
    everything = PromptStream(ROWS, task, SAMPLING, seed=3)
    without = PromptStream(ROWS, task, SAMPLING, seed=3, too_long=frozenset({"q2", "q5"}))
    assert [without.row(p).id for p in range(18)] == [everything.row(p).id for p in range(18)]
    assert {without.row(p).id for p in range(18) if not without.fits(p)} == {"q2", "q5"}
    assert all(everything.fits(p) for p in range(18))
    with pytest.raises(ValueError, match="too long"):
        PromptStream(ROWS[:1], task, SAMPLING, seed=3, too_long=frozenset({"q0"}))


def test_every_position_ends_once_and_after_a_restart_means_the_same() -> None:
    task = PublicationSearch(prompt="short")
    stream = PromptStream(ROWS, task, SAMPLING, seed=3, too_long=frozenset({"q2", "q5", "q8"}))
    ledger = TicketLedger(groups_per_step=4, max_staleness=1)
    issued, aside = issue_fitting(ledger, stream.fits, 8, published=0)
    assert len(issued) == 8
    assert ledger.outstanding == 8
    # The ninth position may be one that is too long: it stays for the next call.
    assert sorted(issued + aside) == list(range(max(issued) + 1))
    assert {stream.row(position).id for position in aside} <= {"q2", "q5", "q8"}
    assert ledger.audit() == {
        "issued": len(issued + aside), "outstanding": 8, "trained": 0, f"set_aside_{PROMPT_TOO_LONG}": len(aside),
    }  # fmt: skip
    resumed = TicketLedger(4, 1, ledger.state())
    assert issue_fitting(resumed, stream.fits, 8, published=0) == (issued, [])
    following, _ = issue_fitting(resumed, stream.fits, 4, published=0)
    assert min(following) > max(issued)
    assert issue_fitting(resumed, stream.fits, 0, published=0) == ([], [])
