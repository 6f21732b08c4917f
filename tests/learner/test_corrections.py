"""Corrections and the log-linear proximal policy against the reference formulas and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.corrections import CORRECTIONS
from learner.losses import LossSettings, PolicyTerms, correction_weights
from learner.proximal import loglinear_proximal
from tests.learner import reference_formulas as reference


def random_streams(seed: int, spread: float = 0.5) -> tuple[reference.Vector, reference.Vector, reference.Integers]:
    """Proximal and behaviour log-probabilities that differ by ``spread`` on average, and their responses."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 8, 5)
    proximal = -rng.exponential(size=int(lengths.sum()))
    return proximal, proximal + rng.normal(scale=spread, size=len(proximal)), np.repeat(np.arange(5), lengths)


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
@given(seed=st.integers(0, 2**32 - 1))
def test_weights_match_the_reference(name: str, seed: int) -> None:
    proximal, behaviour, sequences = random_streams(seed)
    weights = CORRECTIONS[name](torch.from_numpy(proximal - behaviour), torch.from_numpy(sequences), 0.8, 1.5)
    expected = reference.correction(name, proximal, behaviour, sequences, 0.8, 1.5)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-9)


# Two responses: ratios 2, 4 (product 8, geometric mean 2.83) and 0.5, 1 (product 0.5, geometric mean 0.71).
RATIOS = torch.tensor([2.0, 4.0, 0.5, 1.0], dtype=torch.float64)
SEQUENCES = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", [1.0, 1.0, 1.0, 1.0]),
        ("truncate", [2.0, 2.5, 0.5, 1.0]),
        ("mask", [2.0, 0.0, 0.0, 1.0]),
        ("sequence_truncate", [2.5, 2.5, 0.5, 0.5]),
        ("sequence_mask", [0.0, 0.0, 0.5, 1.0]),
    ],
)
def test_by_hand(name: str, expected: list[float]) -> None:
    weights = CORRECTIONS[name](RATIOS.log(), SEQUENCES, 0.7, 2.5)
    assert weights.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_fresh_samples_are_left_alone(name: str) -> None:
    assert CORRECTIONS[name](torch.zeros(4), SEQUENCES, 1.0, 1.0).tolist() == [1.0] * 4


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
@given(seed=st.integers(0, 2**32 - 1))
def test_no_weight_is_negative_and_truncation_bounds_it(name: str, seed: int) -> None:
    proximal, behaviour, sequences = random_streams(seed, spread=30.0)
    weights = CORRECTIONS[name](torch.from_numpy(proximal - behaviour).float(), torch.from_numpy(sequences), 0.5, 3.0)
    assert bool((weights >= 0).all())
    assert bool(weights.isfinite().all())
    if name != "sequence_mask":
        assert float(weights.max()) <= 3.0


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_a_response_does_not_see_the_others(name: str) -> None:
    """So weights do not depend on how the step was cut into micro-batches."""
    whole = CORRECTIONS[name](RATIOS.log(), SEQUENCES, 0.7, 2.5)
    parts = [
        CORRECTIONS[name](RATIOS[cut].log(), torch.zeros(2, dtype=torch.int64), 0.7, 2.5)
        for cut in (slice(2), slice(2, 4))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_an_empty_micro_batch_has_no_weights(name: str) -> None:
    empty = torch.zeros(0)
    assert CORRECTIONS[name](empty, empty.long(), 0.5, 2.0).shape == (0,)


def test_weights_carry_no_gradient_and_survive_extremes() -> None:
    """-500 is a token that the behaviour policy had all but excluded."""
    proximal = torch.tensor([-1.0, 0.0, -500.0], requires_grad=True)
    terms = PolicyTerms(proximal, proximal, torch.tensor([-1.0, -500.0, 0.0]), torch.ones(3), torch.arange(3))
    weights = correction_weights(terms, LossSettings(importance_cap=2.0))
    assert not weights.requires_grad
    np.testing.assert_allclose(weights.numpy(), [1.0, 2.0, 0.0], atol=1e-8)


@given(seed=st.integers(0, 2**32 - 1))
def test_loglinear_matches_the_reference(seed: int) -> None:
    theta, behaviour, _ = random_streams(seed)
    ages = np.random.default_rng(seed).integers(0, 9, len(theta)).astype(np.float64)
    approximation = loglinear_proximal(*(torch.from_numpy(stream) for stream in (theta, behaviour, ages)))
    np.testing.assert_allclose(approximation.numpy(), reference.loglinear(theta, behaviour, ages), rtol=1e-12)


def test_loglinear_by_hand() -> None:
    # mu = 0.2 and theta = 0.4: one version old is halfway in the log, three versions old three quarters.
    theta = torch.full((3,), math.log(0.4), requires_grad=True)
    result = loglinear_proximal(theta, torch.full((3,), math.log(0.2)), torch.tensor([0.0, 1.0, 3.0]))
    assert not result.requires_grad
    assert result.exp().tolist() == pytest.approx([0.2, 0.2 * 2**0.5, 0.2 * 2**0.75])
