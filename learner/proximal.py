"""The proximal policy without a forward pass of its own."""

from __future__ import annotations

from torch import Tensor


def loglinear_proximal(logprobs: Tensor, behaviour: Tensor, ages: Tensor) -> Tensor:
    """log pi_prox ~ log mu + a (log pi_theta - log mu), float [N] without gradient (A-3PO, arXiv 2512.06547).

    Policies are taken to lie on a line, each at its version: a = (v_prox - v_mu) / (v_theta - v_mu), where
    v_theta = v_prox + 1 is the version in the making. A token of age d = v_prox - v_mu thus has
    a = d / (d + 1), and one that was drawn by the proximal policy itself keeps its own log-probability.

    Args:
        logprobs: float [N], under the current policy theta.
        behaviour: float [N], under the policy mu that drew the tokens.
        ages: int or float [N], at least 0: versions between the one that drew a token and the one trained.
    """
    share = ages / (ages + 1)
    return (behaviour + share * (logprobs - behaviour)).detach()
