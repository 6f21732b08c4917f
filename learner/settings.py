"""What the trainer can be told, checked once, and the learning rate that follows from it."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from learner.adapters import LoraSettings
from learner.advantages import ADVANTAGES
from learner.loading import LoadSettings
from learner.losses import DENOMINATORS, KL_ESTIMATORS, LOSSES, LossSettings

LR_SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class TrainerSettings:
    """Settings of the optimization, one training step = one policy version.

    Attributes:
        lr: peak learning rate of AdamW.
        betas, adam_epsilon, weight_decay: of AdamW; the decay is decoupled and spares vectors (norms and
            biases).
        grad_clip: largest gradient norm.
        warmup_steps, lr_schedule, total_steps: linear warm-up, then "constant", or "linear" / "cosine" to 0
            at ``total_steps``.
        advantage, loss, kl_estimator: names in the registries of ``learner.advantages`` and
            ``learner.losses``.
        clip_low, clip_high, importance_cap: see ``LossSettings``.
        kl_coef: weight of the KL to the reference model; 0 loads no reference.
        entropy_coef: weight of the entropy bonus.
        denominator, max_response_tokens: see ``learner.losses.token_weights``; the second is used by
            "constant" only.
        minibatches: optimizer steps per training step.
        micro_batch_tokens: padded tokens per forward pass.
        max_row_tokens: longest row of several responses; 0 chooses from the model's width, see ``Trainer``.
        share_prompts: compute the prompt of a group once instead of once per response.
        temperature: sampling temperature of the behaviour policy.
        compute_dtype, lora, activation_checkpointing, compile, offload: see ``LoadSettings``.
        seed: of the minibatch shuffle and of the adapters.
    """

    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    warmup_steps: int = 0
    lr_schedule: str = "constant"
    total_steps: int = 0
    advantage: str = "grpo"
    loss: str = "decoupled_ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    importance_cap: float = 2.0
    kl_coef: float = 0.001
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    denominator: str = "token_mean"
    max_response_tokens: int = 512
    minibatches: int = 1
    micro_batch_tokens: int = 16384
    max_row_tokens: int = 0
    share_prompts: bool = True
    temperature: float = 1.0
    compute_dtype: str = "float32"
    lora: LoraSettings | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    offload: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("advantage", self.advantage, ADVANTAGES)
        _check_choice("loss", self.loss, LOSSES)
        _check_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        _check_choice("denominator", self.denominator, DENOMINATORS)
        _check_choice("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        for name in (
            "lr",
            "grad_clip",
            "temperature",
            "minibatches",
            "micro_batch_tokens",
            "max_response_tokens",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup_steps", "kl_coef", "max_row_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.lr_schedule != "constant" and self.total_steps <= self.warmup_steps:
            raise ValueError(f"lr_schedule {self.lr_schedule} needs total_steps above warmup_steps")
        self.loss_settings()
        self.load_settings()

    def loss_settings(self) -> LossSettings:
        """The part that the policy losses read.

        Raises:
            ValueError: a bound is out of range.
        """
        return LossSettings(self.clip_low, self.clip_high, self.importance_cap)

    def load_settings(self) -> LoadSettings:
        """The part that says how policy and reference are loaded.

        Raises:
            ValueError: unknown compute dtype or offload.
        """
        return LoadSettings(
            self.compute_dtype, self.lora, self.activation_checkpointing, self.compile, self.offload, self.seed
        )


def _check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")


def learning_rate(step: int, settings: TrainerSettings) -> float:
    """Learning rate of training step ``step`` (counted from 0).

    Warm-up is linear and reaches the peak at step ``warmup_steps - 1``, so that no step runs at rate 0; a
    decaying schedule would reach 0 at ``total_steps``, one step after the last.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.lr_schedule == "constant":
        return settings.lr
    progress = min(1.0, (step - settings.warmup_steps) / (settings.total_steps - settings.warmup_steps))
    if settings.lr_schedule == "linear":
        return settings.lr * (1.0 - progress)
    return settings.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
