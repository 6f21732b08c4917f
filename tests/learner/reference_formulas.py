"""The formulas of ``learner.advantages``, ``corrections``, ``losses`` and ``proximal`` once more, straight from
the papers: float64 numpy, one token at a time, no torch and nothing of the learner's.

A stop-gradient is an argument: ``frozen`` are the current log-probabilities as the stopped parts see them, so
a finite difference in ``theta`` with ``frozen`` held is the gradient that training must have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Integers = NDArray[np.int64]


def positions(labels: Integers) -> dict[int, list[int]]:
    """Where each label stands."""
    places: dict[int, list[int]] = {}
    for index, label in enumerate(labels.tolist()):
        places.setdefault(label, []).append(index)
    return places


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Population standard deviation."""
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / len(values))


def whiten(values: Vector) -> Vector:
    middle, spread = mean(values.tolist()), deviation(values.tolist())
    return np.array([(value - middle) / (spread + 1e-6) for value in values])


# Advantages


def rewards_to_go(rewards: Vector, sequences: Integers, discount: float) -> Vector:
    """sum_{k >= t} discount^(k - t) r_k, by its definition."""
    result = np.zeros_like(rewards)
    for tokens in positions(sequences).values():
        for start, token in enumerate(tokens):
            result[token] = math.fsum(discount**k * rewards[later] for k, later in enumerate(tokens[start:]))
    return result


def gae(
    rewards: Vector, values: Vector, sequences: Integers, gamma: float, lam: float, critic_lam: float | None = None
) -> tuple[Vector, Vector]:
    """Whitened advantages, and returns with a lambda of their own (arXiv 2503.01491)."""
    raw = raw_gae(rewards, values, sequences, gamma, lam)
    targets = raw if critic_lam is None else raw_gae(rewards, values, sequences, gamma, critic_lam)
    return whiten(raw), targets + values


def whitened_per_group(raw: Vector, sequences: Integers, groups: Integers) -> Vector:
    """Every group whitened by itself, the tokens of a response together weighing as much as those of another."""
    whitened = np.zeros_like(raw)
    responses = positions(sequences)
    for members in positions(groups).values():
        centre = mean([mean(raw[responses[member]]) for member in members])
        spread = mean([mean((raw[responses[member]] - centre) ** 2) for member in members]) ** 0.5
        for member in members:
            whitened[responses[member]] = (raw[responses[member]] - centre) / (spread + 1e-6)
    return whitened


def raw_gae(rewards: Vector, values: Vector, sequences: Integers, gamma: float, lam: float) -> Vector:
    """Advantages by the recursion of arXiv 1506.02438."""
    raw = np.zeros_like(rewards)
    for tokens in positions(sequences).values():
        following_value = following_advantage = 0.0
        for token in reversed(tokens):
            delta = rewards[token] + gamma * following_value - values[token]
            following_advantage = delta + gamma * lam * following_advantage
            following_value = values[token]
            raw[token] = following_advantage
    return raw


def group_relative(name: str, rewards: Vector, sequences: Integers, groups: Integers) -> Vector:
    """Advantage of every token from the summed reward of its response and of the others in its group."""
    totals = [math.fsum(rewards[token] for token in tokens) for tokens in positions(sequences).values()]
    per_response = np.zeros(len(totals))
    for members in positions(groups).values():
        scores = [totals[member] for member in members]
        for place, member in enumerate(members):
            others = scores[:place] + scores[place + 1 :]
            centred = totals[member] - mean(scores)
            per_response[member] = {
                "grpo": centred / (deviation(scores) + 1e-6),
                "dr_grpo": centred,
                "rloo": totals[member] - mean(others) if others else 0.0,
                "reinforce_plus_plus_baseline": centred,
            }[name]
    if name == "reinforce_plus_plus_baseline":
        per_response = whiten(per_response)
    return np.array([per_response[sequence] for sequence in sequences])


# Corrections


def correction(name: str, proximal: Vector, behaviour: Vector, sequences: Integers, low: float, cap: float) -> Vector:
    weights = np.ones_like(proximal)
    for tokens in positions(sequences).values():
        ratios = [math.exp(proximal[token] - behaviour[token]) for token in tokens]
        product = math.prod(ratios)
        geometric = product ** (1 / len(ratios))
        for token, ratio in zip(tokens, ratios, strict=True):
            weights[token] = {
                "none": 1.0,
                "truncate": min(ratio, cap),
                "mask": ratio if low <= ratio <= cap else 0.0,
                "sequence_truncate": min(product, cap),
                "sequence_mask": ratio if low <= geometric <= cap else 0.0,
            }[name]
    return weights


def loglinear(theta: Vector, behaviour: Vector, ages: Vector) -> Vector:
    """mu and theta mixed by their distance in versions: with v_mu = 0, v_prox = age and v_theta = age + 1."""
    mixed = []
    for new, old, age in zip(theta, behaviour, ages, strict=True):
        share = (age - 0) / (age + 1 - 0)
        mixed.append(old + share * (new - old))
    return np.array(mixed)


# Losses


@dataclass(frozen=True)
class Bounds:
    low: float
    high: float
    dual: float | None
    correction: str
    importance_low: float
    importance_cap: float


@dataclass(frozen=True)
class Streams:
    proximal: Vector
    behaviour: Vector
    advantages: Vector
    sequences: Integers


def clip(value: float, lowest: float, highest: float) -> float:
    return lowest if value < lowest else highest if value > highest else value


def surrogate(ratio: float, advantage: float, bounds: Bounds) -> float:
    """Negated PPO objective of one token, with dual clip where the advantage is negative."""
    objective = min(ratio * advantage, clip(ratio, 1 - bounds.low, 1 + bounds.high) * advantage)
    if bounds.dual is not None and advantage < 0:
        objective = max(objective, bounds.dual * advantage)
    return -objective


def gspo_ratio(theta: Vector, frozen: Vector, proximal: Vector, sequences: Integers) -> Vector:
    """s_{i,t} = sg(s_i) pi_theta / sg(pi_theta), arXiv 2507.18071."""
    ratios = np.zeros_like(theta)
    for tokens in positions(sequences).values():
        geometric = math.prod(math.exp(frozen[token] - proximal[token]) for token in tokens) ** (1 / len(tokens))
        for token in tokens:
            ratios[token] = geometric * math.exp(theta[token]) / math.exp(frozen[token])
    return ratios


def policy_loss(name: str, theta: Vector, frozen: Vector, streams: Streams, bounds: Bounds) -> Vector:
    """Loss of every token, weighted with the correction where the loss has one."""
    weights = correction(
        bounds.correction,
        streams.proximal,
        streams.behaviour,
        streams.sequences,
        bounds.importance_low,
        bounds.importance_cap,
    )
    sequence_ratio = gspo_ratio(theta, frozen, streams.proximal, streams.sequences)
    losses = np.zeros_like(theta)
    for token, advantage in enumerate(streams.advantages):
        ratio = math.exp(theta[token] - streams.proximal[token])
        whole = math.exp(theta[token] - streams.behaviour[token])
        frozen_ratio = math.exp(frozen[token] - streams.proximal[token])
        frozen_whole = math.exp(frozen[token] - streams.behaviour[token])
        cispo_weight = clip(frozen_ratio, 1 - bounds.low, 1 + bounds.high)
        losses[token] = {
            "ppo_clip": surrogate(ratio, advantage, bounds),
            "decoupled_ppo": weights[token] * surrogate(ratio, advantage, bounds),
            "behaviour_ppo": surrogate(whole, advantage, bounds),
            "tis": -min(frozen_whole, bounds.importance_cap) * advantage * theta[token],
            "cispo": -weights[token] * cispo_weight * advantage * theta[token],
            "gspo": weights[token] * surrogate(sequence_ratio[token], advantage, bounds),
        }[name]
    return losses


def gspo_objective(theta: Vector, streams: Streams, bounds: Bounds) -> float:
    """The objective of the paper itself: the mean over responses of the clipped s_i A_i, to be maximised."""
    terms = []
    for tokens in positions(streams.sequences).values():
        log_ratio = mean([theta[token] - streams.proximal[token] for token in tokens])
        terms.append(-surrogate(math.exp(log_ratio), streams.advantages[tokens[0]], bounds))
    return mean(terms)


def value_loss(values: Vector, old_values: Vector, returns: Vector, eps: float) -> Vector:
    losses = []
    for value, old, target in zip(values, old_values, returns, strict=True):
        bounded = clip(value, old - eps, old + eps)
        losses.append(0.5 * max((value - target) ** 2, (bounded - target) ** 2))
    return np.array(losses)


def kl(name: str, theta: Vector, frozen: Vector, reference: Vector) -> Vector:
    """The estimators of joschu.net/blog/kl-approx.html, d = log pi - log pi_ref."""
    estimates = []
    for new, stopped, old in zip(theta, frozen, reference, strict=True):
        d, fixed = new - old, stopped - old
        k2, k3 = d**2 / 2, math.exp(-d) - 1 + d
        # The value of k3 at the stopped point; only k2 moves with theta.
        straight_through = (math.exp(-fixed) - 1 + fixed) + k2 - fixed**2 / 2
        estimates.append({"k1": d, "k2": k2, "k3": k3, "k3+": straight_through}[name])
    return np.array(estimates)


def token_weights(lengths: Sequence[int], denominator: str, largest: int) -> Vector:
    """One weight per token of responses with these lengths, which are the whole step."""
    weights = []
    for length in lengths:
        share = {
            "token_mean": 1 / sum(lengths),
            "sequence_mean": 1 / (len(lengths) * length),
            "constant": 1 / (len(lengths) * largest),
        }[denominator]
        weights.extend([share] * length)
    return np.array(weights)


def gradient(function: Callable[[Vector], Vector | float], at: Vector, step: float = 1e-6) -> Vector:
    """d sum(function) / d at, by central differences."""
    slopes = []
    for index in range(len(at)):
        shift = np.zeros_like(at)
        shift[index] = step
        slopes.append((np.sum(function(at + shift)) - np.sum(function(at - shift))) / (2 * step))
    return np.array(slopes)
