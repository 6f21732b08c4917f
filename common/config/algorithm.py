"""The section `algorithm`, and which of its choices go together (docs/algorithms.md says what each one computes)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat

from common.config.section import Section

# Kept beside the registries of the learner, which this package must not import; a test compares them.
GROUP_RELATIVE = frozenset({"grpo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline"})
NEEDS_CRITIC = frozenset({"gae"})

Advantage = Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]
Loss = Literal["ppo_clip", "decoupled_ppo", "behaviour_ppo", "tis", "cispo", "gspo"]
Correction = Literal["none", "truncate", "mask", "sequence_truncate", "sequence_mask"]
KlEstimator = Literal["k1", "k2", "k3", "k3+"]


class AlgorithmConfig(Section):
    """Advantages, policy loss, critic and regularisers; docs/algorithms.md has the formulas."""

    advantage: Advantage = Field("grpo", description="Advantage estimator; gae needs a critic")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount per token (gae, reinforce_plus_plus)")
    gae_lambda: float = Field(1.0, ge=0, le=1, description="GAE: bias against variance; 1: the plain return")
    critic_lambda: float | None = Field(
        None, ge=0, le=1, description="gae_lambda of the critic's targets; null: the same as the policy's"
    )
    whitening: Literal["step", "group"] = Field(
        "step",
        description="gae: standardise over the step's tokens, or over each group, so that prompts weigh the same",
    )
    loss: Loss = Field("decoupled_ppo", description="Policy loss; decoupled_ppo corrects stale samples by a weight")
    proximal: Literal["recompute", "loglinear"] = Field(
        "recompute", description="Policy at the step's start where there are minibatches: scored again, or interpolated"
    )
    clip_low: float = Field(0.2, ge=0, le=1, description="PPO clip below 1")
    clip_high: float = Field(0.2, ge=0, description="PPO clip above 1 (clip-higher: 0.28)")
    dual_clip: float | None = Field(None, gt=1, description="Bound of the ratio where the advantage is negative, as 3")
    correction: Correction = Field("truncate", description="Weight of stale samples, from behaviour to proximal policy")
    importance_low: float = Field(0.5, ge=0, le=1, description="correction: mask, sequence_mask: drop weights below it")
    importance_cap: float = Field(2.0, ge=1, description="Cap of the correction weight; masks drop what is above it")
    kl_coef: float = Field(0.001, ge=0, description="Coefficient of the KL to the reference model; 0: no reference")
    kl_in: Literal["loss", "reward"] = Field("loss", description="KL as part of the loss, or of each token's reward")
    kl_estimator: KlEstimator | None = Field(
        None, description="KL estimator (Schulman 2020); null: k3 in the loss, k1 in the reward"
    )
    entropy_coef: float = Field(0.0, description="Coefficient of the entropy bonus")
    denominator: Literal["token_mean", "sequence_mean", "constant"] = Field(
        "token_mean", description="What the summed token losses of a step are divided by"
    )
    critic: Literal["none", "separate", "shared"] = Field(
        "none", description="Value function: a model of its own, or a head on the policy (gae only)"
    )
    critic_lr: PositiveFloat = Field(1e-5, description="Learning rate of the critic; the schedule is the learner's")
    critic_epochs: int = Field(1, ge=1, description="Passes of a separate critic over the samples of a step")
    critic_warmup_steps: int = Field(0, ge=0, description="First steps in which the critic alone is trained")
    value_clip: PositiveFloat | None = Field(0.5, description="Furthest a value may move per step; null: no bound")
    value_coef: PositiveFloat = Field(0.1, description="critic: shared: weight of the value loss in the common loss")
    filter_zero_variance: bool | None = Field(
        None, description="Set groups with equal rewards aside; null: where the advantage compares within groups"
    )

    @property
    def filters_zero_variance(self) -> bool:
        """Whether groups with equal rewards are set aside instead of trained on."""
        if self.filter_zero_variance is None:
            return self.advantage in GROUP_RELATIVE
        return self.filter_zero_variance

    @property
    def chosen_kl_estimator(self) -> str:
        """`kl_estimator`, or the usual one of the place where the KL is counted."""
        return self.kl_estimator or ("k3" if self.kl_in == "loss" else "k1")


def check_algorithm(algorithm: AlgorithmConfig, group_size: int, steps: int) -> None:
    """Refuse choices that do not go together.

    Raises:
        ValueError: naming the two keys and what to set.
    """
    _check_advantage(algorithm, group_size)
    _check_critic(algorithm, steps)
    _check_kl(algorithm)
    if algorithm.loss == "gspo" and algorithm.denominator != "sequence_mean":
        raise ValueError(
            f"algorithm.loss=gspo weighs whole responses, algorithm.denominator={algorithm.denominator} weighs "
            "tokens: set algorithm.denominator=sequence_mean"
        )


def _check_advantage(algorithm: AlgorithmConfig, group_size: int) -> None:
    if algorithm.advantage in GROUP_RELATIVE and group_size < 2:
        raise ValueError(
            f"sampling.group_size is {group_size}, but algorithm.advantage={algorithm.advantage} compares samples of "
            "one prompt: set it to 2 or more, or the advantage to gae or reinforce_plus_plus"
        )
    if algorithm.whitening == "group" and (algorithm.advantage != "gae" or group_size < 2):
        raise ValueError(
            "algorithm.whitening=group standardises the advantages of gae over the samples of one prompt: it needs "
            "algorithm.advantage=gae and sampling.group_size of 2 or more, or set algorithm.whitening=step"
        )
    if algorithm.filter_zero_variance and group_size < 2:
        raise ValueError("a group of one always has equal rewards: set algorithm.filter_zero_variance=false")


def _check_critic(algorithm: AlgorithmConfig, steps: int) -> None:
    if algorithm.advantage in NEEDS_CRITIC and algorithm.critic == "none":
        raise ValueError(
            f"algorithm.advantage={algorithm.advantage} needs values: set algorithm.critic=separate (a model of its "
            "own) or algorithm.critic=shared (a head on the policy)"
        )
    if algorithm.advantage not in NEEDS_CRITIC and algorithm.critic != "none":
        raise ValueError(
            f"algorithm.advantage={algorithm.advantage} reads no values: set algorithm.critic=none, or "
            "algorithm.advantage=gae"
        )
    if algorithm.critic_epochs > 1 and algorithm.critic != "separate":
        raise ValueError(
            f"algorithm.critic_epochs={algorithm.critic_epochs} needs a critic of its own: set "
            "algorithm.critic=separate (with algorithm.advantage=gae), or algorithm.critic_epochs=1"
        )
    if algorithm.critic_lambda is not None and algorithm.critic == "none":
        raise ValueError("algorithm.critic_lambda is set, but there is no critic: set it to null")
    if algorithm.critic_warmup_steps and algorithm.critic == "none":
        raise ValueError("algorithm.critic_warmup_steps is set, but there is no critic: set it to 0")
    if algorithm.critic_warmup_steps >= steps:
        raise ValueError(
            f"algorithm.critic_warmup_steps={algorithm.critic_warmup_steps} leaves none of learner.steps={steps} "
            "for the policy: make it smaller"
        )


def _check_kl(algorithm: AlgorithmConfig) -> None:
    if algorithm.kl_in == "reward" and algorithm.kl_coef == 0:
        raise ValueError(
            "algorithm.kl_in=reward, but algorithm.kl_coef=0 counts no KL: set kl_coef above 0, or kl_in=loss"
        )
    if algorithm.kl_in == "loss" and algorithm.kl_coef > 0 and algorithm.kl_estimator == "k1":
        raise ValueError(
            "algorithm.kl_estimator=k1 has a gradient of mean zero as a loss: use k2, k3 or k3+, or kl_in=reward"
        )
    if algorithm.kl_in == "reward" and algorithm.kl_estimator == "k3+":
        raise ValueError(
            "algorithm.kl_estimator=k3+ is k3 with another gradient, and a reward has none: set k3 or k1 with "
            "algorithm.kl_in=reward"
        )
