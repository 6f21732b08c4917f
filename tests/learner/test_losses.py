"""Losses against an independent float64 implementation, token by token, and against values worked out by
hand.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.losses import (
    KL_ESTIMATORS,
    LOSSES,
    LossSettings,
    PolicyTerms,
    StepTotals,
    effective_sample_size,
    token_weights,
    truncated_importance_weights,
    weighted_sum,
)

SETTINGS = LossSettings(clip_low=0.2, clip_high=0.3, importance_cap=2.0)


def reference_loss(name: str, theta: float, prox: float, mu: float, advantage: float) -> float:
    """The textbook formulas on Python floats."""
    if name == "tis":
        return -min(math.exp(theta - mu), 2.0) * advantage * theta
    anchor = mu if name == "behaviour_ppo" else prox
    ratio = math.exp(theta - anchor)
    bounded = 0.8 if ratio < 0.8 else 1.3 if ratio > 1.3 else ratio
    weight = min(math.exp(prox - mu), 2.0) if name == "decoupled_ppo" else 1.0
    return -weight * min(ratio * advantage, bounded * advantage)


def terms_of(rows: list[tuple[float, float, float, float]]) -> PolicyTerms:
    columns = torch.tensor(rows, dtype=torch.float64).T
    return PolicyTerms(columns[0].clone().requires_grad_(), columns[1], columns[2], columns[3])


logprob = st.floats(-6, 0)
token = st.tuples(logprob, logprob, logprob, st.floats(-3, 3))


@pytest.mark.parametrize("name", sorted(LOSSES))
@given(rows=st.lists(token, min_size=1, max_size=20))
def test_losses_match_the_reference(name: str, rows: list[tuple[float, float, float, float]]) -> None:
    losses = LOSSES[name](terms_of(rows), SETTINGS).losses
    expected = [reference_loss(name, *row) for row in rows]
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-9, atol=1e-12)


# theta - prox = ln 2 (ratio 2), prox - mu = ln 1.5 (weight 1.5), A = 1: decoupled loss -1.5 x 1.3 = -1.95.
RATIO_TWO = (math.log(0.6), math.log(0.3), math.log(0.2), 1.0)


@pytest.mark.parametrize(
    ("name", "row", "loss", "clipped", "gradient"),
    [
        ("ppo_clip", RATIO_TWO, -1.3, True, 0.0),
        ("decoupled_ppo", RATIO_TWO, -1.95, True, 0.0),
        # A < 0 and ratio 2: the minimum keeps the unclipped side, so the gradient -A r = 2 is there.
        ("ppo_clip", (*RATIO_TWO[:3], -1.0), 2.0, False, 2.0),
        ("decoupled_ppo", (*RATIO_TWO[:3], -1.0), 3.0, False, 3.0),
        # A < 0 and ratio 0.5 is clipped at 0.8.
        ("ppo_clip", (math.log(0.2), math.log(0.4), math.log(0.4), -1.0), 0.8, True, 0.0),
        # Ratio to mu is 3, clipped at 1.3.
        ("behaviour_ppo", RATIO_TWO, -1.3, True, 0.0),
        # min(3, cap 2) x A x log 0.6; the weight has no gradient of its own.
        ("tis", RATIO_TWO, -2.0 * math.log(0.6), False, -2.0),
        # prox / mu = 4 is capped at 2; ratio 1.
        ("decoupled_ppo", (math.log(0.4), math.log(0.4), math.log(0.1), 3.0), -6.0, False, -6.0),
    ],
)
def test_golden_values(
    name: str, row: tuple[float, float, float, float], loss: float, clipped: bool, gradient: float
) -> None:
    terms = terms_of([row])
    result = LOSSES[name](terms, SETTINGS)
    result.losses.sum().backward()
    assert result.losses.item() == pytest.approx(loss)
    assert bool(result.clipped) is clipped
    assert terms.logprobs.grad is not None
    assert terms.logprobs.grad.item() == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_on_policy_every_loss_has_the_policy_gradient(name: str) -> None:
    terms = terms_of([(-1.0, -1.0, -1.0, 2.0), (-3.0, -3.0, -3.0, -0.5)])
    LOSSES[name](terms, SETTINGS).losses.sum().backward()
    assert terms.logprobs.grad is not None
    np.testing.assert_allclose(terms.logprobs.grad.numpy(), [-2.0, 0.5])


def test_importance_weights_carry_no_gradient_and_survive_extremes() -> None:
    proximal = torch.tensor([-1.0, 0.0, -500.0], requires_grad=True)
    weights = truncated_importance_weights(proximal, torch.tensor([-1.0, -500.0, 0.0]), cap=2.0)
    assert not weights.requires_grad
    np.testing.assert_allclose(weights.numpy(), [1.0, 2.0, 0.0], atol=1e-8)


@pytest.mark.parametrize(
    ("name", "value"), [("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", 0.5 - 1 + math.log(2))]
)
def test_kl_by_hand(name: str, value: float) -> None:
    # pi = 0.8, pi_ref = 0.4, so d = ln 2.
    estimate = KL_ESTIMATORS[name](torch.tensor([math.log(0.8)]), torch.tensor([math.log(0.4)]))
    assert estimate.item() == pytest.approx(value, rel=1e-5)


def test_kl_estimators_agree_with_the_exact_divergence() -> None:
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    exact = float((policy * (policy / reference).log()).sum())
    for name in ("k1", "k3"):
        expectation = (policy * KL_ESTIMATORS[name](policy.log(), reference.log())).sum()
        assert float(expectation) == pytest.approx(exact, rel=1e-9)
    assert float((policy * KL_ESTIMATORS["k2"](policy.log(), reference.log())).sum()) > 0


@given(st.floats(-12, 0), st.floats(-12, 0))
def test_k3_is_never_negative(logprob: float, reference: float) -> None:
    assert float(KL_ESTIMATORS["k3"](torch.tensor(logprob), torch.tensor(reference))) >= 0


def test_denominators_by_hand() -> None:
    # Two responses, of 1 and 3 tokens, with per-token losses 4 | 1 2 3.
    lengths, values = torch.tensor([1, 3, 3, 3]), torch.tensor([4.0, 1.0, 2.0, 3.0])
    totals = StepTotals(tokens=4, sequences=2)

    def reduce(denominator: str) -> float:
        return float(weighted_sum(values, token_weights(lengths, totals, denominator, max_response_tokens=10)))

    assert reduce("token_mean") == pytest.approx(10 / 4)
    assert reduce("sequence_mean") == pytest.approx((4 + 2) / 2)
    assert reduce("constant") == pytest.approx(10 / 20)
    with pytest.raises(ValueError, match="unknown denominator 'median': choose one of token_mean"):
        reduce("median")


@given(
    lengths=st.lists(st.integers(1, 6), min_size=2, max_size=8),
    cut=st.integers(1, 7),
    denominator=st.sampled_from(["token_mean", "sequence_mean", "constant"]),
)
def test_reduction_does_not_depend_on_the_split(lengths: list[int], cut: int, denominator: str) -> None:
    per_token = torch.tensor([length for length in lengths for _ in range(length)], dtype=torch.float64)
    values = torch.arange(len(per_token), dtype=torch.float64)
    totals = StepTotals(tokens=len(per_token), sequences=len(lengths))

    def reduce(part: slice) -> float:
        return float(weighted_sum(values[part], token_weights(per_token[part], totals, denominator, 6)))

    assert reduce(slice(cut)) + reduce(slice(cut, None)) == pytest.approx(reduce(slice(None)), rel=1e-5)


def test_tokens_of_weight_zero_cannot_spoil_the_sum() -> None:
    values = torch.tensor([1.0, math.nan, math.inf], requires_grad=True)
    total = weighted_sum(values, torch.tensor([2.0, 0.0, 0.0]))
    assert total.item() == 2.0


def test_effective_sample_size() -> None:
    assert effective_sample_size(4.0, 4.0, 4) == 1.0
    assert effective_sample_size(3.0, 9.0, 3) == pytest.approx(1 / 3)
    assert effective_sample_size(0.0, 0.0, 3) == 0.0


@pytest.mark.parametrize(
    "bounds", [{"clip_low": -0.1}, {"clip_low": 1.5}, {"clip_high": -1.0}, {"importance_cap": 0.0}]
)
def test_impossible_bounds_are_refused(bounds: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        LossSettings(**bounds)
