"""The learner's smaller parts: prompt stream, evaluation, figures of a step and of the fleet."""

from __future__ import annotations

import numpy as np
import pytest

from common import messages as m
from common.scores import InvalidOutput, Scored
from common.tasks import Row
from common.tasks.publication_search import PublicationSearch
from learner.evaluation import Evaluation
from learner.fleet_figures import FleetFigures
from learner.prompts import EVAL_TICKETS_FROM, PromptStream
from learner.step_record import describe_groups, is_zero_variance, staleness_histogram, train_samples

ROWS = [Row(f"q{n}", f"request {n}", (str(n),)) for n in range(7)]
TASK = PublicationSearch(prompt="short", reasoning=False)
SAMPLING = m.Sampling(samples=2, temperature=1.0, top_p=1.0, max_tokens=8)


def group(rewards: list[float], tokens: list[int], versions: list[int], ticket_id: int = 0) -> m.ScoredGroup:
    samples = tuple(
        m.SampleHeader(f"text {i}", n, "stop", (m.WeightSpan(v, 0, n),))
        for i, (n, v) in enumerate(zip(tokens, versions, strict=True))
    )
    total = sum(tokens)
    rollout = m.Rollout(
        m.RolloutHeader(ticket_id, "a", 2, samples),
        np.array([1, 2], np.int32),
        np.arange(total, dtype=np.int32),
        -np.arange(total, dtype=np.float32),
    )
    ticket = PromptStream(ROWS, TASK, SAMPLING, 0).ticket(0, 0)
    scores = tuple(Scored(reward, {"recall": reward / 10, "query_words": 2.0}, "q", 1) for reward in rewards)
    return m.ScoredGroup(ticket, rollout, m.GroupScores(ticket_id, "r", scores))


def test_every_epoch_holds_every_request_once_in_an_order_of_its_own() -> None:
    stream = PromptStream(ROWS, TASK, SAMPLING, seed=3)
    epochs = [[stream.row(position).id for position in range(7 * e, 7 * e + 7)] for e in range(3)]
    assert all(sorted(epoch) == [row.id for row in ROWS] for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = PromptStream(ROWS, TASK, SAMPLING, seed=3)
    assert [again.row(position).id for position in range(14)] == epochs[0] + epochs[1]
    assert [PromptStream(ROWS, TASK, SAMPLING, seed=4).row(p).id for p in range(7)] != epochs[0]


def test_a_ticket_carries_what_actor_and_rewarder_need() -> None:
    ticket = PromptStream(ROWS, TASK, SAMPLING, seed=3).ticket(9, min_version=5)
    assert (ticket.ticket_id, ticket.epoch, ticket.min_version, ticket.kind) == (9, 1, 5, "train")
    assert ticket.messages == (m.ChatMessage("user", ticket.reference["text"]),)
    assert m.decode(m.encode(ticket), m.Ticket) == ticket


def test_no_request_is_an_error() -> None:
    with pytest.raises(ValueError, match="no judged request"):
        PromptStream([], TASK, SAMPLING, 0)


def test_samples_are_cut_out_of_the_groups_arrays() -> None:
    first, second = train_samples(group([1.0, 2.0], [3, 2], [4, 5]))
    assert first.response_ids.tolist() == [0, 1, 2]
    assert second.response_ids.tolist() == [3, 4]
    assert second.behaviour_logprobs.tolist() == [-3.0, -4.0]
    assert (first.reward, second.reward) == (1.0, 2.0)
    assert (first.versions.tolist(), second.versions.tolist()) == ([4, 4, 4], [5, 5])
    assert first.versions.dtype == np.int32
    assert first.prompt_ids.tolist() == second.prompt_ids.tolist() == [1, 2]


def test_equal_rewards_teach_nothing() -> None:
    assert is_zero_variance(group([1.0, 1.0], [1, 1], [0, 0]))
    assert not is_zero_variance(group([1.0, 1.5], [1, 1], [0, 0]))


def test_staleness_is_counted_per_token() -> None:
    groups = [group([1.0, 2.0], [3, 2], [4, 6])]
    assert staleness_histogram(groups, version=6) == {2: 3, 0: 2}
    figures = describe_groups(groups, 6, "recall")
    assert figures["staleness/mean"] == pytest.approx(6 / 5)
    assert figures["staleness/max"] == 2
    assert figures["reward/mean"] == 1.5
    assert figures["recall/train"] == pytest.approx(0.15)
    assert figures["length/query"] == 2.0
    assert figures["staleness/tokens_at_2"] == 3


def answer(ticket: m.Ticket, recall: float | None) -> m.ScoredGroup:
    score = InvalidOutput(-4.0, "missing_tag") if recall is None else Scored(1.0, {"recall": recall}, "asked", 3)
    sample = m.SampleHeader("the text", 1, "stop", (m.WeightSpan(0, 0, 1),))
    one = np.ones(1, np.int32)
    header = m.RolloutHeader(ticket.ticket_id, "a", 1, (sample,))
    rollout = m.Rollout(header, one, one, one.astype(np.float32))
    return m.ScoredGroup(ticket, rollout, m.GroupScores(ticket.ticket_id, "r", (score,)))


def test_an_evaluation_counts_every_request_once_and_invalid_answers_as_zero() -> None:
    evaluation = Evaluation(2, 10, ROWS[:3], TASK, max_tokens=8)
    tickets = evaluation.tickets()
    assert all(t.kind == "eval" and t.ticket_id >= EVAL_TICKETS_FROM and t.sampling.temperature == 0 for t in tickets)
    assert evaluation.receive(answer(tickets[2], 0.5))
    assert not evaluation.receive(answer(tickets[2], 1.0)), "a second answer changes nothing"
    assert [t.ticket_id for t in evaluation.tickets()] == [t.ticket_id for t in tickets[:2]]
    assert not evaluation.receive(answer(Evaluation(1, 9, ROWS[:3], TASK, 8).tickets()[0], 1.0)), "another round"
    evaluation.receive(answer(tickets[0], 1.0))
    assert not evaluation.done
    evaluation.receive(answer(tickets[1], None))
    assert evaluation.done
    result = evaluation.result()
    assert [row.id for row in result.rows] == ["q0", "q1", "q2"]
    assert result.values == [1.0, 0.0, 0.5]
    assert [row.query for row in result.rows] == ["asked", None, "asked"]
    assert result.version == 10


def test_an_evaluation_carries_the_metric_of_its_task() -> None:
    class Precise(PublicationSearch):
        metric = "precision"

    evaluation = Evaluation(0, 3, ROWS[:1], Precise(), max_tokens=8)
    score = Scored(1.0, {"recall": 0.0, "precision": 0.25}, "asked", 3)
    group = answer(evaluation.tickets()[0], 0.0)
    group = m.ScoredGroup(group.ticket, group.rollout, m.GroupScores(group.ticket.ticket_id, "r", (score,)))
    assert evaluation.receive(group)
    result = evaluation.result()
    assert (result.metric_key, result.values, result.rows[0].hits) == ("precision/heldout", [0.25], None)
    assert describe_groups([group], 3, "precision")["precision/train"] == 0.25


def status(busy: float, alive: float, tokens: float, slots: int = 0) -> m.StatusReply:
    counters = {"busy_s": busy, "alive_s": alive, "generated_tokens": tokens}
    actor = m.PeerEntry("actor-0", "actor", 1, 0.0, m.PeerStatus(counters=counters))
    stages = {"rollout": m.StageStatus(2, 3, 10, 0, 0)}
    return m.StatusReply(stages, (actor,), 0, slots, 0)  # type: ignore[arg-type]


def test_fleet_figures_are_differences() -> None:
    figures = FleetFigures(quota_per_s=10.0)
    figures.since_last(status(5.0, 10.0, 100, slots=4), 1.0)
    second = figures.since_last(status(8.0, 14.0, 500, slots=24), 4.0)
    assert second["idle/actor"] == pytest.approx(0.25)
    assert second["tokens/generated_per_s"] == 100
    assert second["quota/utilisation"] == pytest.approx(0.5)
    assert second["queue/rollout"] == 5
    restarted = figures.since_last(status(0.1, 0.2, 3, slots=24), 1.0)
    assert "idle/actor" not in restarted, "an actor that started again would count backwards"
