"""Value loss, KL estimators and denominators against the reference formulas and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.losses import (
    DENOMINATORS,
    KL_ESTIMATORS,
    StepTotals,
    effective_sample_size,
    token_weights,
    value_loss,
    weighted_sum,
)
from tests.learner import reference_formulas as reference


@pytest.mark.parametrize("clip", [0.2, 0.5, math.inf])
@pytest.mark.parametrize("seed", range(8))
def test_value_loss_matches_the_reference(seed: int, clip: float) -> None:
    rng = np.random.default_rng(seed)
    current, old, returns = rng.normal(size=(3, 30))
    values = torch.tensor(current, requires_grad=True)
    losses = value_loss(values, torch.from_numpy(old), torch.from_numpy(returns), clip).losses
    expected = reference.value_loss(current, old, returns, clip)
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-12)
    (gradient,) = torch.autograd.grad(losses.sum(), values)
    slopes = reference.gradient(lambda moved: reference.value_loss(moved, old, returns, clip), current)
    np.testing.assert_allclose(gradient.numpy(), slopes, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("value", "loss", "clipped", "gradient"),
    [
        # From 0 towards a return of 2, at most 0.5 in one step.
        (0.4, 0.5 * 1.6**2, False, -1.6),
        (0.9, 0.5 * 1.5**2, True, 0.0),
        # Away from the return the full error counts.
        (-0.9, 0.5 * 2.9**2, False, -2.9),
    ],
)
def test_value_loss_by_hand(value: float, loss: float, clipped: bool, gradient: float) -> None:
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    result = value_loss(values, zero, zero + 2, clip=0.5)
    assert result.losses.item() == pytest.approx(loss)
    assert bool(result.clipped) is clipped
    assert torch.autograd.grad(result.losses.sum(), values)[0].item() == pytest.approx(gradient)


@given(seed=st.integers(0, 2**32 - 1))
def test_without_clip_no_value_counts_as_clipped(seed: int) -> None:
    current, old, returns = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed))
    result = value_loss(current, old, returns, clip=math.inf)
    assert not bool(result.clipped.any())
    torch.testing.assert_close(result.losses, 0.5 * (current - returns).square())


@pytest.mark.parametrize("name", sorted(KL_ESTIMATORS))
@pytest.mark.parametrize("seed", range(4))
def test_kl_matches_the_reference(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    theta, anchor = -rng.exponential(size=(2, 30))
    logprobs = torch.tensor(theta, requires_grad=True)
    estimates = KL_ESTIMATORS[name](logprobs, torch.from_numpy(anchor))
    np.testing.assert_allclose(estimates.detach().numpy(), reference.kl(name, theta, theta, anchor), atol=1e-12)
    (gradient,) = torch.autograd.grad(estimates.sum(), logprobs)
    slopes = reference.gradient(lambda moved: reference.kl(name, moved, theta, anchor), theta)
    np.testing.assert_allclose(gradient.numpy(), slopes, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "value", "gradient"),
    [
        ("k1", math.log(2), 1.0),
        ("k2", math.log(2) ** 2 / 2, math.log(2)),
        ("k3", math.log(2) - 0.5, 0.5),
        ("k3+", math.log(2) - 0.5, math.log(2)),
    ],
)
def test_kl_by_hand(name: str, value: float, gradient: float) -> None:
    # pi = 0.8, pi_ref = 0.4, so d = ln 2.
    logprobs = torch.tensor([math.log(0.8)], dtype=torch.float64, requires_grad=True)
    estimate = KL_ESTIMATORS[name](logprobs, torch.tensor([math.log(0.4)], dtype=torch.float64))
    assert estimate.item() == pytest.approx(value)
    assert torch.autograd.grad(estimate.sum(), logprobs)[0].item() == pytest.approx(gradient)


POLICY_LOGITS = torch.tensor([0.5, 0.0, -0.4], dtype=torch.float64)
REFERENCE = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)


@pytest.mark.parametrize("name", ["k1", "k3", "k3+"])
def test_unbiased_estimators_average_to_the_exact_divergence(name: str) -> None:
    policy = POLICY_LOGITS.softmax(0)
    exact = float((policy * (policy / REFERENCE).log()).sum())
    expectation = float((policy * KL_ESTIMATORS[name](policy.log(), REFERENCE.log())).sum())
    assert expectation == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(("name", "right"), [("k1", False), ("k2", True), ("k3", False), ("k3+", True)])
def test_which_estimators_have_the_gradient_of_the_divergence(name: str, right: bool) -> None:
    """As a loss on samples: the expectation of the estimator's gradient, its sampling probabilities held fixed."""
    logits = POLICY_LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - REFERENCE.log())).sum(), logits, retain_graph=True)
    sampled = (logprobs.detach().exp() * KL_ESTIMATORS[name](logprobs, REFERENCE.log())).sum()
    (gradient,) = torch.autograd.grad(sampled, logits)
    assert torch.allclose(gradient, exact, atol=1e-12) is right


@pytest.mark.parametrize("name", ["k2", "k3", "k3+"])
@given(st.floats(-1000, 0), st.floats(-1000, 0))
def test_no_estimate_is_negative_or_overflows(name: str, logprob: float, anchor: float) -> None:
    estimate = float(KL_ESTIMATORS[name](torch.tensor(logprob), torch.tensor(anchor)))
    assert 0 <= estimate < math.inf


@pytest.mark.parametrize("denominator", DENOMINATORS)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_token_weights_match_the_reference(denominator: str, lengths: list[int]) -> None:
    per_token = torch.tensor([length for length in lengths for _ in range(length)])
    totals = StepTotals(tokens=sum(lengths), sequences=len(lengths))
    weights = token_weights(per_token, totals, denominator, max_response_tokens=9)
    expected = reference.token_weights(lengths, denominator, largest=9)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)


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
    denominator=st.sampled_from(DENOMINATORS),
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
