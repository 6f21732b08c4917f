"""Policy losses against the reference formulas, values and gradients, and against values worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.corrections import CORRECTIONS
from learner.losses import DENOMINATORS, LOSSES, LossSettings, PolicyTerms, StepTotals, token_weights, weighted_sum
from tests.learner import reference_formulas as reference

SETTINGS = LossSettings(clip_low=0.2, clip_high=0.3, importance_low=0.6, importance_cap=1.8)
CORRECTED = ("decoupled_ppo", "cispo", "gspo")


def bounds_of(settings: LossSettings) -> reference.Bounds:
    return reference.Bounds(
        settings.clip_low,
        settings.clip_high,
        settings.dual_clip,
        settings.correction,
        settings.importance_low,
        settings.importance_cap,
    )


def random_case(seed: int, spread: float = 0.3) -> tuple[reference.Vector, reference.Streams]:
    """Log-probabilities of the current policy, and the rest of a micro-batch of 5 responses."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 8, 5)
    tokens = int(lengths.sum())
    theta = -rng.exponential(size=tokens)
    proximal = theta + rng.normal(scale=spread, size=tokens)
    behaviour = proximal + rng.normal(scale=spread, size=tokens)
    streams = reference.Streams(proximal, behaviour, rng.normal(size=tokens), np.repeat(np.arange(5), lengths))
    return theta, streams


def terms_of(theta: reference.Vector, streams: reference.Streams) -> PolicyTerms:
    return PolicyTerms(
        torch.tensor(theta, requires_grad=True),
        torch.from_numpy(streams.proximal),
        torch.from_numpy(streams.behaviour),
        torch.from_numpy(streams.advantages),
        torch.from_numpy(streams.sequences),
    )


def gradient_of(
    name: str, terms: PolicyTerms, settings: LossSettings, weights: torch.Tensor | None = None
) -> np.ndarray:
    losses = LOSSES[name](terms, settings).losses
    total = losses.sum() if weights is None else weighted_sum(losses, weights)
    (gradient,) = torch.autograd.grad(total, terms.logprobs)
    return gradient.numpy()


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("name", sorted(LOSSES))
@given(seed=st.integers(0, 2**32 - 1), correction=st.sampled_from(sorted(CORRECTIONS)))
def test_values_match_the_reference(name: str, dual_clip: float | None, seed: int, correction: str) -> None:
    settings = replace(SETTINGS, dual_clip=dual_clip, correction=correction)
    theta, streams = random_case(seed)
    losses = LOSSES[name](terms_of(theta, streams), settings).losses
    expected = reference.policy_loss(name, theta, theta, streams, bounds_of(settings))
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-9, atol=1e-12)


# Seeds are fixed: a finite difference across the kink of a clip would be off.
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("correction", sorted(CORRECTIONS))
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients_match_finite_differences(name: str, correction: str, dual_clip: float | None) -> None:
    settings = replace(SETTINGS, dual_clip=dual_clip, correction=correction)
    for seed in range(4):
        theta, streams = random_case(seed)
        expected = reference.gradient(
            lambda moved, frozen=theta, rest=streams: reference.policy_loss(
                name, moved, frozen, rest, bounds_of(settings)
            ),
            theta,
        )
        actual = gradient_of(name, terms_of(theta, streams), settings)
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_gspo_has_the_gradient_of_its_sequence_objective(seed: int) -> None:
    """The token form must be the paper's objective, where whole responses are clipped and averaged."""
    theta, streams = random_case(seed)
    streams = replace(streams, advantages=np.random.default_rng(seed).normal(size=5)[streams.sequences])
    settings = replace(SETTINGS, correction="none", clip_low=0.05, clip_high=0.05)
    lengths = torch.from_numpy(np.bincount(streams.sequences)[streams.sequences])
    weights = token_weights(lengths, StepTotals(len(theta), 5), "sequence_mean", 1).double()
    expected = -reference.gradient(lambda moved: reference.gspo_objective(moved, streams, bounds_of(settings)), theta)
    actual = gradient_of("gspo", terms_of(theta, streams), settings, weights)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", sorted(LOSSES))
@given(seed=st.integers(0, 2**32 - 1), correction=st.sampled_from(sorted(CORRECTIONS)))
def test_on_policy_every_loss_has_the_gradient_of_reinforce(name: str, seed: int, correction: str) -> None:
    theta, streams = random_case(seed)
    fresh = replace(streams, proximal=theta.copy(), behaviour=theta.copy())
    gradient = gradient_of(name, terms_of(theta, fresh), replace(SETTINGS, correction=correction, dual_clip=3.0))
    # REINFORCE: the gradient of -A log pi.
    np.testing.assert_allclose(gradient, -fresh.advantages, rtol=1e-9)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - set(CORRECTED)))
@given(seed=st.integers(0, 2**32 - 1))
def test_a_ratio_to_the_behaviour_policy_is_not_corrected_twice(name: str, seed: int) -> None:
    terms = terms_of(*random_case(seed))
    plain = LOSSES[name](terms, replace(SETTINGS, correction="none")).losses
    for correction in CORRECTIONS:
        assert torch.equal(LOSSES[name](terms, replace(SETTINGS, correction=correction)).losses, plain)


@pytest.mark.parametrize("name", CORRECTED)
def test_masked_tokens_have_no_gradient_and_stay_counted(name: str) -> None:
    # The second response is far off the band, the first is fresh.
    behaviour = torch.tensor([-1.0, -1.0, -5.0, -5.0])
    advantages, sequences = torch.ones(4), torch.tensor([0, 0, 1, 1])
    settings = replace(SETTINGS, correction="sequence_mask")
    theta = torch.full((4,), -1.0, requires_grad=True)
    terms = PolicyTerms(theta, theta.detach(), behaviour, advantages, sequences)
    weights = token_weights(torch.full((4,), 2), StepTotals(4, 2), "token_mean", 2)
    assert gradient_of(name, terms, settings, weights).tolist() == [-0.25, -0.25, 0.0, 0.0]


# theta / prox = 2, prox / mu = 1.5, A = 1.
RATIO_TWO = (math.log(0.6), math.log(0.3), math.log(0.2), 1.0)


@pytest.mark.parametrize(
    ("name", "row", "loss", "clipped", "gradient"),
    [
        ("ppo_clip", RATIO_TWO, -1.3, True, 0.0),
        ("decoupled_ppo", RATIO_TWO, -1.5 * 1.3, True, 0.0),
        # A < 0 and ratio 2: the minimum keeps the unclipped side, so the gradient -A r = 2 is there.
        ("ppo_clip", (*RATIO_TWO[:3], -1.0), 2.0, False, 2.0),
        ("decoupled_ppo", (*RATIO_TWO[:3], -1.0), 3.0, False, 3.0),
        # A < 0 and ratio 0.5 is clipped at 0.8.
        ("ppo_clip", (math.log(0.2), math.log(0.4), math.log(0.4), -1.0), 0.8, True, 0.0),
        # A < 0 and ratio 4 is beyond the dual clip of 3.
        ("ppo_clip", (math.log(0.8), math.log(0.2), math.log(0.2), -2.0), 6.0, True, 0.0),
        # Ratio to mu is 3, clipped at 1.3.
        ("behaviour_ppo", RATIO_TWO, -1.3, True, 0.0),
        # min(3, cap 1.8) x A x log 0.6; the weight has no gradient of its own.
        ("tis", RATIO_TWO, -1.8 * math.log(0.6), True, -1.8),
        ("tis", (math.log(0.3), math.log(0.3), math.log(0.2), 1.0), -1.5 * math.log(0.3), False, -1.5),
        # prox / mu = 4 is capped at 1.8; ratio 1.
        ("decoupled_ppo", (math.log(0.4), math.log(0.4), math.log(0.1), 3.0), -5.4, False, -5.4),
        # A clipped token keeps its gradient, with the weight 1.5 x 1.3.
        ("cispo", RATIO_TWO, -1.95 * math.log(0.6), True, -1.95),
        ("gspo", RATIO_TWO, -1.95, True, 0.0),
    ],
)
def test_golden_values(
    name: str, row: tuple[float, float, float, float], loss: float, clipped: bool, gradient: float
) -> None:
    theta, proximal, behaviour, advantage = (np.array([value]) for value in row)
    streams = reference.Streams(proximal, behaviour, advantage, np.zeros(1, dtype=np.int64))
    terms = terms_of(theta, streams)
    settings = replace(SETTINGS, dual_clip=3.0)
    result = LOSSES[name](terms, settings)
    assert result.losses.item() == pytest.approx(loss)
    assert bool(result.clipped) is clipped
    assert gradient_of(name, terms, settings).item() == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES))
@given(
    seed=st.integers(0, 2**32 - 1),
    cut=st.integers(1, 4),
    correction=st.sampled_from(sorted(CORRECTIONS)),
    denominator=st.sampled_from(DENOMINATORS),
)
def test_micro_batches_do_not_change_the_loss(
    name: str, seed: int, cut: int, correction: str, denominator: str
) -> None:
    """Cut between responses, and in the opposite order."""
    settings = replace(SETTINGS, correction=correction)
    theta, streams = random_case(seed)
    counts = np.bincount(streams.sequences)
    totals = StepTotals(len(theta), 5)

    def total(tokens: np.ndarray) -> float:
        part = reference.Streams(
            streams.proximal[tokens],
            streams.behaviour[tokens],
            streams.advantages[tokens],
            streams.sequences[tokens] - streams.sequences[tokens].min(),
        )
        lengths = torch.from_numpy(counts[streams.sequences[tokens]])
        weights = token_weights(lengths, totals, denominator, 8).double()
        losses = LOSSES[name](terms_of(theta[tokens], part), settings).losses
        return float(weighted_sum(losses.detach(), weights))

    first, second = np.flatnonzero(streams.sequences < cut), np.flatnonzero(streams.sequences >= cut)
    assert total(second) + total(first) == pytest.approx(total(np.arange(len(theta))), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_extreme_ratios_stay_finite(name: str) -> None:
    theta = torch.tensor([0.0, -500.0, -500.0], requires_grad=True)
    other = torch.tensor([-500.0, 0.0, -500.0])
    terms = PolicyTerms(theta, other, other, torch.tensor([1.0, -1.0, 1.0]), torch.arange(3))
    assert bool(LOSSES[name](terms, SETTINGS).losses.isfinite().all())
    assert bool(np.isfinite(gradient_of(name, terms, SETTINGS)).all())


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_an_empty_micro_batch_has_no_losses(name: str) -> None:
    empty = torch.zeros(0)
    assert LOSSES[name](PolicyTerms(empty, empty, empty, empty, empty.long()), SETTINGS).losses.shape == (0,)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"clip_low": -0.1}, "clip_low must be"),
        ({"clip_low": 1.5}, "clip_low must be"),
        ({"clip_high": -1.0}, "clip_high at least 0"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1"),
        ({"correction": "icepop"}, "unknown correction 'icepop': choose one of none, truncate, mask"),
        ({"importance_cap": 0.5}, "importance_cap at least 1"),
        ({"importance_low": 1.5}, "importance_low must be"),
    ],
)
def test_impossible_bounds_are_refused(bounds: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSettings(**bounds)
