"""What the trainer can be told, checked once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields

from learner.adapters import LoraSettings
from learner.advantages import ADVANTAGES, NEEDS_CRITIC, AdvantageSettings
from learner.loading import LoadSettings
from learner.losses import DENOMINATORS, KL_ESTIMATORS, LOSSES, LossSettings

LR_SCHEDULES = ("constant", "linear", "cosine")
CRITICS = ("none", "separate", "shared")
PROXIMALS = ("recompute", "loglinear")
KL_PLACES = ("loss", "reward")


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
        gamma, gae_lambda, critic_lambda, whitening: see ``AdvantageSettings``.
        clip_low, clip_high, dual_clip, correction, importance_low, importance_cap: see ``LossSettings``.
        proximal: where a step has several minibatches, the policy at its start is scored once more
            ("recompute") or taken to lie between behaviour and current policy ("loglinear").
        kl_coef: weight of the KL to the reference model; 0 loads no reference.
        kl_in: "loss" adds the KL to the loss of each token, "reward" takes it from the token's reward.
        entropy_coef: weight of the entropy bonus.
        denominator, max_response_tokens: see ``learner.losses.token_weights``; the second is used by
            "constant" only.
        critic: "none", "separate" (a model of its own) or "shared" (a value head on the policy).
        critic_lr: peak learning rate of the critic, on the policy's schedule; of the head where it is shared.
        critic_epochs: passes of a separate critic over the samples of a step, each an update per minibatch (several
            as in OpenAI's Spinning Up, ``train_v_iters``); a shared critic is updated with the policy.
        critic_warmup_steps: first training steps in which the policy stays as it is.
        value_clip: see ``learner.losses.value_loss``; None for no clip.
        value_coef: weight of the value loss where the critic is shared.
        minibatches: optimizer steps per training step.
        micro_batch_tokens: input tokens per forward pass; a sample that is longer has one to itself.
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
    gamma: float = 1.0
    gae_lambda: float = 1.0
    critic_lambda: float | None = None
    whitening: str = "step"
    loss: str = "decoupled_ppo"
    proximal: str = "recompute"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    correction: str = "truncate"
    importance_low: float = 0.5
    importance_cap: float = 2.0
    kl_coef: float = 0.001
    kl_in: str = "loss"
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    denominator: str = "token_mean"
    max_response_tokens: int = 512
    critic: str = "none"
    critic_lr: float = 1e-5
    critic_epochs: int = 1
    critic_warmup_steps: int = 0
    value_clip: float | None = 0.5
    value_coef: float = 0.1
    minibatches: int = 1
    micro_batch_tokens: int = 16384
    share_prompts: bool = True
    temperature: float = 1.0
    compute_dtype: str = "float32"
    lora: LoraSettings | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    offload: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.lr_schedule != "constant" and self.total_steps <= self.warmup_steps:
            raise ValueError(f"lr_schedule {self.lr_schedule} needs total_steps above warmup_steps")
        if (self.advantage in NEEDS_CRITIC) != (self.critic != "none"):
            raise ValueError(f"advantage {self.advantage} and critic {self.critic} do not go together: gae needs one")
        if self.critic_epochs > 1 and self.critic != "separate":
            raise ValueError(f"critic_epochs {self.critic_epochs} needs critic separate, got {self.critic}")
        if self.value_clip is not None and self.value_clip <= 0:
            raise ValueError(f"value_clip must be positive (None turns it off), got {self.value_clip}")
        self.loss_settings()
        self.advantage_settings()
        self.load_settings()

    def loss_settings(self) -> LossSettings:
        """The part that the policy losses read.

        Raises:
            ValueError: a bound is out of range.
        """
        return LossSettings(**{field.name: getattr(self, field.name) for field in fields(LossSettings)})

    def advantage_settings(self) -> AdvantageSettings:
        """The part that the advantage estimators read.

        Raises:
            ValueError: a discount is out of range, or the whitening unknown.
        """
        return AdvantageSettings(self.gamma, self.gae_lambda, self.critic_lambda, self.whitening)

    def load_settings(self) -> LoadSettings:
        """The part that says how policy and reference are loaded.

        Raises:
            ValueError: unknown compute dtype or offload.
        """
        return LoadSettings(
            self.compute_dtype, self.lora, self.activation_checkpointing, self.compile, self.offload, self.seed
        )


_CHOICES: dict[str, Collection[str]] = {
    "advantage": ADVANTAGES,
    "loss": LOSSES,
    "proximal": PROXIMALS,
    "kl_in": KL_PLACES,
    "kl_estimator": KL_ESTIMATORS,
    "denominator": DENOMINATORS,
    "critic": CRITICS,
    "lr_schedule": LR_SCHEDULES,
}
_POSITIVE = (
    "lr",
    "critic_lr",
    "critic_epochs",
    "value_coef",
    "grad_clip",
    "temperature",
    "minibatches",
    "micro_batch_tokens",
    "max_response_tokens",
)
_NOT_NEGATIVE = ("weight_decay", "warmup_steps", "critic_warmup_steps", "kl_coef")


def _check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")
